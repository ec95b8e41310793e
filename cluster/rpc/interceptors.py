"""The RPC edge: one server interceptor through which every call comes in and every error goes out."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias, TypeVar, cast

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from cluster.core import Violation
from cluster.errors import EaselError, InvalidRequest
from cluster.rpc.status import abort
from cluster.rpc.wire import parse

MAX_REQUEST_BYTES = 4 * 2**20

Request = TypeVar("Request")
Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for type checkers only
Behaviour = Callable[[Message, Context], Any]
Parser = Callable[[bytes], Message]

_log = logging.getLogger(__name__)


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Parses requests, and turns what a handler raises into a status.

    An EaselError becomes its status with google.rpc details. A request that is too large, or that protobuf
    cannot parse (bad UTF-8, say), becomes INVALID_ARGUMENT with a field violation. Any other exception
    becomes INTERNAL with an id, and is logged once, with that id and its traceback. Cancelling and grpc's own
    aborts pass. Handlers that take a stream of requests (reflection) are left alone, and so are handlers that
    are not async.
    """

    def __init__(self, *, max_request_bytes: int = MAX_REQUEST_BYTES) -> None:
        self._max_request_bytes = max_request_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Response] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Response] | None:
        """Put the edge around the handler that the server found; None when it has no such method."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        parser = self._parser(method)
        if handler is None or handler.request_streaming or parser is None:
            return handler
        if handler.response_streaming:
            return _stream_handler(handler, parser, method)
        return _unary_handler(handler, parser, method)

    def _parser(self, method: str) -> Parser | None:
        message_type = request_type(method)
        if message_type is None:
            return None

        def checked(data: bytes) -> Message:
            if len(data) > self._max_request_bytes:
                what = f"is {len(data)} bytes; at most {self._max_request_bytes} bytes are allowed"
                raise InvalidRequest([Violation("request", what)])
            return parse(message_type, data)

        return checked


def request_type(method: str) -> type[Message] | None:
    """The message type of "/package.Service/Method" in the contract; None where it has no such method."""
    # A handler holds only a deserialising function.
    try:
        found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return None
    return message_factory.GetMessageClass(found.input_type)


def _unary_handler(handler: Handler, parser: Parser, method: str) -> Handler:
    inner = cast(Behaviour, handler.unary_unary)
    if not inspect.iscoroutinefunction(inner):
        return handler

    async def unary(data: bytes, context: Context) -> Message:
        async with _edge(context, method):
            response: Message = await inner(parser(data), context)
        return response

    return _made(grpc.unary_unary_rpc_method_handler, unary, handler)


def _stream_handler(handler: Handler, parser: Parser, method: str) -> Handler:
    inner = cast(Behaviour, handler.unary_stream)

    async def generator(data: bytes, context: Context) -> AsyncIterator[Message]:
        async with _edge(context, method), aclosing(inner(parser(data), context)) as messages:
            async for message in messages:
                yield message

    async def writer(data: bytes, context: Context) -> None:
        async with _edge(context, method):
            await inner(parser(data), context)

    if inspect.isasyncgenfunction(inner):
        return _made(grpc.unary_stream_rpc_method_handler, generator, handler)
    if inspect.iscoroutinefunction(inner):
        return _made(grpc.unary_stream_rpc_method_handler, writer, handler)
    return handler


def _made(factory: Callable[..., Handler], behaviour: Callable[..., Any], handler: Handler) -> Handler:
    # Without a deserialiser grpc hands the request over as bytes, so that parsing happens inside the edge.
    return factory(behaviour, request_deserializer=None, response_serializer=handler.response_serializer)


@asynccontextmanager
async def _edge(context: Context, method: str) -> AsyncIterator[None]:
    try:
        yield
    except EaselError as error:
        await abort(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception:  # noqa: BLE001 - this is the RPC edge, where unknown errors end
        error_id = uuid.uuid4().hex[:12]
        _log.exception("error %s in %s", error_id, method)
        await abort(context, EaselError(f"an unexpected error, {error_id} in the server's log"))
