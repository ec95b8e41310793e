"""Who may call: the outermost interceptor of the public server. A call that it refuses is not even parsed."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar, cast

import grpc

from cluster.errors import EaselError, QuotaExceeded
from cluster.rpc.status import abort
from cluster.security.gate import Gate
from cluster.security.identity import OPEN, Identity

Request = TypeVar("Request")
Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for type checkers only

# Load balancers and probes have no credential, and learn no more than that somebody serves.
OPEN_TO_ALL = "/grpc.health.v1.Health/"
RETRY_AFTER_MS = 1000

# grpc runs the interceptors and the handler of a call in one task, so this is the call's own. It has no default: a
# server without the interceptor knows nobody.
_caller: ContextVar[Identity] = ContextVar("caller")


def caller() -> Identity:
    """Who made the call that is being handled. Raises LookupError outside of one."""
    return _caller.get()


@contextmanager
def retold(identity: Identity) -> Iterator[None]:
    """Errors raised inside speak of jobs by the ids that the caller knows."""
    try:
        yield
    except EaselError as error:
        error.args = (identity.retold(str(error)), *error.args[1:])
        raise


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Finds out who calls, and refuses those it does not know, and those who have too many calls open here.

    `most_streams` says how many calls a tenant may have open at this server; None for any number.
    """

    def __init__(self, gate: Gate, most_streams: Callable[[str], int | None] = lambda tenant: None) -> None:
        self._gate = gate
        self._most_streams = most_streams
        self._open: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Response] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Response] | None:
        """The handler that the server found, for a caller that may have it; one that refuses for any other."""
        if handler_call_details.method.startswith(OPEN_TO_ALL):
            _caller.set(OPEN)
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        try:
            identity = self._gate.identify([_text(value) for key, value in metadata if key == "authorization"])
        except EaselError as error:
            return _refusing(error)
        _caller.set(identity)
        handler = await continuation(handler_call_details)
        most = self._most_streams(identity.tenant) if identity.scoped else None
        return handler if handler is None or most is None else self._counting(handler, identity.tenant, most)

    def _counting(self, handler: Handler, tenant: str, most: int) -> Handler:
        """The same handler, which counts the call for as long as it is open."""
        inner = cast("Callable[..., Any]", _behaviour(handler))

        async def single(request: Any, context: Context) -> Any:  # noqa: ANN401 - whatever the handler takes
            async with self._counted(tenant, most, context):
                return await inner(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: ANN401
            async with self._counted(tenant, most, context), aclosing(inner(request, context)) as messages:
                async for message in messages:
                    yield message

        return _remade(handler, stream if inspect.isasyncgenfunction(inner) else single)

    @asynccontextmanager
    async def _counted(self, tenant: str, most: int, context: Context) -> AsyncIterator[None]:
        if self._open[tenant] >= most:
            full = f"the tenant has {most} calls open at this router, its limit (security.quotas: streams)"
            await abort(context, QuotaExceeded(full, retry_after_ms=RETRY_AFTER_MS))
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _refusing(error: EaselError) -> Handler:
    async def refuse(requests: object, context: Context) -> None:
        del requests
        await abort(context, error)

    # As a stream it answers before a message has been read, whatever the method is.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _behaviour(handler: Handler) -> object:
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary


def _remade(handler: Handler, behaviour: Callable[..., Any]) -> Handler:
    if handler.request_streaming:
        kinds = (grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler)
    else:
        kinds = (grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler)
    factory = cast("Callable[..., Handler]", kinds[bool(handler.response_streaming)])
    return factory(behaviour, handler.request_deserializer, handler.response_serializer)
