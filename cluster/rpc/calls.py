"""What a router's calls tell: how many are open, how they ended, and a span for each that starts a job."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar, cast

import grpc

from cluster.rpc.interceptors import Context, Handler, request_type
from cluster.telemetry import metrics
from cluster.telemetry.telemetry import Telemetry
from cluster.telemetry.tracing import Span, call_traceparent, traceparent_in

Request = TypeVar("Request")
Response = TypeVar("Response")

PACKAGE = "/easel.v1."
UNKNOWN_METHOD = "unknown"
# The others read or order; they are traced where their caller traces them, and start no trace.
STARTS_JOBS = frozenset({"Generate", "StreamGenerate", "Submit"})
_WORDS = {code.value[0]: code.name for code in grpc.StatusCode}


class CallWatch(grpc.aio.ServerInterceptor):
    """Watches the calls of the public contract; the outermost interceptor, so that it sees how they end.

    The span of a call is in `call_traceparent` while its handler runs.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._open: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Response] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Response] | None:
        """Put the watch around the handler that the others made; None when there is no such method."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or not path.startswith(PACKAGE):
            return handler
        if handler.request_streaming:
            return self._refusal(handler, path)
        if handler.response_streaming:
            return self._stream_handler(handler, path)
        return self._unary_handler(handler, path)

    def _unary_handler(self, handler: Handler, path: str) -> Handler:
        inner = cast("Callable[[Any, Context], Awaitable[Any]]", handler.unary_unary)

        async def unary(request: object, context: Context) -> object:
            with self._call(context, path):
                return await inner(request, context)

        return _made(grpc.unary_unary_rpc_method_handler, unary, handler)

    def _stream_handler(self, handler: Handler, path: str) -> Handler:
        inner = cast("Callable[[Any, Context], Any]", handler.unary_stream)

        async def generator(request: object, context: Context) -> AsyncIterator[object]:
            with self._call(context, path):
                async with aclosing(inner(request, context)) as messages:
                    async for message in messages:
                        yield message

        # The contract's streams are all generators; of another kind it is not known when it ends.
        if not inspect.isasyncgenfunction(inner):
            return handler
        return _made(grpc.unary_stream_rpc_method_handler, generator, handler)

    def _refusal(self, handler: Handler, path: str) -> Handler:
        """The contract has no streams of requests: this one refuses a caller (cluster/rpc/auth.py), who gets no span
        and names no new label."""
        inner = cast("Callable[[Any, Context], Awaitable[None]]", handler.stream_stream)
        method = path.rpartition("/")[2] if request_type(path) else UNKNOWN_METHOD

        async def refuse(requests: object, context: Context) -> None:
            try:
                await inner(requests, context)
            finally:
                self._telemetry.recorder.add(metrics.CALLS, method=method, code=_word(context))

        return _made(grpc.stream_stream_rpc_method_handler, refuse, handler)

    @contextmanager
    def _call(self, context: Context, path: str) -> Iterator[None]:
        method, recorder = path.rpartition("/")[2], self._telemetry.recorder
        span = self._span(context, path, method)
        self._count(method, 1)
        code = "UNKNOWN"
        try:
            yield
            code = _word(context)
        except (asyncio.CancelledError, GeneratorExit):
            left_s = context.time_remaining()
            code = "DEADLINE_EXCEEDED" if left_s is not None and left_s <= 0 else "CANCELLED"
            raise
        except BaseException:
            code = _word(context)
            raise
        finally:
            self._count(method, -1)
            recorder.add(metrics.CALLS, method=method, code=code)
            if span is not None:
                span.end(error=None if code == "OK" else code, attributes={"rpc.grpc.status_code": code})

    def _span(self, context: Context, path: str, method: str) -> Span | None:
        parent = traceparent_in(cast("Any", context.invocation_metadata()))
        if not parent and method not in STARTS_JOBS:
            return None
        span = self._telemetry.tracer.start(path[1:], parent=parent, kind="server", attributes={"rpc.system": "grpc"})
        call_traceparent.set(span.traceparent)
        return span

    def _count(self, method: str, change: int) -> None:
        self._open[method] += change
        self._telemetry.recorder.set(metrics.OPEN_STREAMS, self._open[method], method=method)


def _word(context: Context) -> str:
    """The status that the handler, or the edge around it, has set."""
    code: Any = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return _WORDS.get(number or 0, "UNKNOWN")


def _made(factory: Callable[..., Handler], behaviour: Callable[..., Any], handler: Handler) -> Handler:
    return factory(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
