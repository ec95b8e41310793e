"""Traces by OpenTelemetry, to a collector over OTLP/gRPC. Needs the extra `otel`.

Spans wait in a bounded queue and a thread of the library's sends them: with a collector that is slow or away, the
oldest are dropped, and no job notices.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cluster import __version__
from cluster.config import TraceSettings
from cluster.errors import ConfigError
from cluster.telemetry.tracing import Attributes, Kind, Span, TraceParent, parse_traceparent

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
except ModuleNotFoundError as error:
    missing = f"telemetry.traces.enabled: traces need {error.name}; pip install 'easel[otel]', or turn them off"
    raise ConfigError(missing) from error

if TYPE_CHECKING:
    from opentelemetry.context import Context

BATCH_SPANS = 512
SEND_EVERY_MS = 1000
MAX_EVENTS = 256
_KINDS = {"server": trace.SpanKind.SERVER, "client": trace.SpanKind.CLIENT, "internal": trace.SpanKind.INTERNAL}


def make_tracer(settings: TraceSettings, *, process: str, service: str) -> OtelTracer:
    """A tracer that sends to the collector of the settings; nothing is dialled before there is a span."""
    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint,
        insecure=settings.endpoint.startswith("http://"),
        timeout=settings.export_timeout_s,
    )
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=settings.queue_spans,
        schedule_delay_millis=SEND_EVERY_MS,
        max_export_batch_size=min(BATCH_SPANS, settings.queue_spans),
    )
    ids = _AgreedIds()
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        resource=Resource({"service.name": service, "service.instance.id": process, "service.version": __version__}),
        id_generator=ids,
        span_limits=SpanLimits(max_events=MAX_EVENTS, max_attributes=64, max_attribute_length=500),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(processor)
    return OtelTracer(provider, ids)


class _AgreedIds(RandomIdGenerator):
    """Random ids, but for a span whose id was agreed on before."""

    agreed: int | None = None

    def generate_span_id(self) -> int:
        agreed, self.agreed = self.agreed, None
        return super().generate_span_id() if agreed is None else agreed


class OtelTracer:
    """Owns a provider, its queue and its thread."""

    def __init__(self, provider: TracerProvider, ids: _AgreedIds) -> None:
        self._provider = provider
        self._ids = ids
        self._tracer = provider.get_tracer("easel", __version__)
        self._closing, self._closed = threading.Event(), threading.Event()
        # Made now: a process that exits can start no thread any more, and the library's own end is not bounded.
        threading.Thread(target=self._shut_down, name="traces-end", daemon=True).start()

    def start(
        self,
        name: str,
        *,
        parent: str,
        kind: Kind = "internal",
        attributes: Attributes | None = None,
        started_ns: int | None = None,
        as_span: str = "",
    ) -> Span:
        """See Tracer."""
        agreed = parse_traceparent(as_span)
        self._ids.agreed = None if agreed is None else int(agreed.span_id, 16)
        span = self._tracer.start_span(
            name, context=_context(parent), kind=_KINDS[kind], attributes=attributes, start_time=started_ns
        )
        self._ids.agreed = None
        return OtelSpan(span)

    def close(self, timeout_s: float) -> None:
        """See Tracer."""
        self._closing.set()
        self._closed.wait(timeout_s)

    def _shut_down(self) -> None:
        self._closing.wait()
        self._provider.shutdown()
        self._closed.set()


class OtelSpan:
    """A span of the library. One that is not sampled still names its trace, so that others leave it out too."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        sampled = context.trace_flags.sampled
        self.traceparent = str(TraceParent(f"{context.trace_id:032x}", f"{context.span_id:016x}", sampled=sampled))

    def event(self, name: str, attributes: Attributes) -> None:
        """See Span."""
        self._span.add_event(name, attributes)

    def end(self, *, error: str | None = None, attributes: Attributes | None = None) -> None:
        """See Span."""
        if not self._span.is_recording():
            return
        if attributes:
            self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end()


def _context(parent: str) -> Context:
    """What the library calls a context: one that holds the parent span, or no span."""
    named = parse_traceparent(parent)
    empty = trace.set_span_in_context(trace.INVALID_SPAN)
    if named is None:
        return empty
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if named.sampled else trace.TraceFlags.DEFAULT)
    remote = trace.SpanContext(int(named.trace_id, 16), int(named.span_id, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(remote))
