"""An OpenTelemetry collector in this process: a real OTLP/gRPC server that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(pb_grpc.TraceServiceServicer):
    """Keeps spans by the service that sent them. While `answers` is not set, it lets its callers wait."""

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[tuple[str, Span]] = []
        self.answers = threading.Event()
        self.answers.set()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802, ANN401
        """Named by OpenTelemetry's proto."""
        self.answers.wait(30.0)
        for group in request.resource_spans:
            service = next(item.value.string_value for item in group.resource.attributes if item.key == "service.name")
            self.spans += [(service, span) for scope in group.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """All spans of a name, in the order they began."""
        found = [span for _, span in self.spans if span.name == name]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def only(self, name: str) -> Span:
        """The one span of a name."""
        (span,) = self.named(name)
        return span


def attributes(span: Span) -> dict[str, Any]:
    """The attributes of a span as plain values."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value") or "") for item in span.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated so
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        collector.answers.set()
        server.stop(None).wait()
