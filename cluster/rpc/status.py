"""Errors on the wire: EaselError to a gRPC status with google.rpc details, and back.

gRPC clients accept about 8 KiB of trailing metadata, and a status that is larger reaches the caller as an
unrelated error. What goes into a status is therefore cut to fit: the message and each violation, and how many
there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as PackedDetail
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no py.typed
from grpc_status import rpc_status

from cluster.core import Violation
from cluster.errors import (
    DeadlineExceeded,
    EaselError,
    InvalidRequest,
    JobNotFound,
    PermissionDenied,
    QueueFull,
    RequestIdReused,
    Unauthenticated,
    Unavailable,
)

Detail = TypeVar("Detail", bound=Message)

DOMAIN = "easel"
MAX_VIOLATIONS = 12
MAX_TEXT_BYTES = 240
MAX_MESSAGE_BYTES = 720

_DETAILS_KEY = "grpc-status-details-bin"
_BY_CODE: dict[grpc.StatusCode, type[EaselError]] = {
    grpc.StatusCode.NOT_FOUND: JobNotFound,
    grpc.StatusCode.ALREADY_EXISTS: RequestIdReused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    # Easel's own cancels carry details, and a caller that cancels gets no status: a bare one is a server going down.
    grpc.StatusCode.CANCELLED: Unavailable,
}
# What grpc says when the process at the other end dies or closes its server in the middle of a call. The code is
# mostly UNAVAILABLE, but depends on which of the two threads at work sees the end first.
_BROKEN_STREAM = (
    "stream removed",
    "rst_stream",
    "goaway",
    "socket closed",
    "connection reset",
    "connection closed",
    "broken pipe",
    "endpoint closing",
    "cancelling all calls",
)
_BROKEN_CODES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED})


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: EaselError) -> NoReturn:
    """End a call with the status of `error`; raises grpc's own AbortError."""
    rich = rpc_status.to_status(status_of(error))
    await context.abort(rich.code, rich.details, rich.trailing_metadata or ())


def status_of(error: EaselError) -> status_pb2.Status:
    """A google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    code: int = error.code.value[0]
    status = status_pb2.Status(code=code, message=shorten(_one_line(error), MAX_MESSAGE_BYTES))
    status.details.extend(_packed(_details(error)))
    return status


def _one_line(error: EaselError) -> str:
    return " ".join(str(error).split())


def _details(error: EaselError) -> Iterator[Message]:
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if isinstance(error, InvalidRequest):
        yield error_details_pb2.BadRequest(field_violations=list(_field_violations(error.violations)))
    if error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _field_violations(violations: tuple[Violation, ...]) -> Iterator[Message]:
    shown = violations if len(violations) <= MAX_VIOLATIONS else violations[: MAX_VIOLATIONS - 1]
    for violation in shown:
        text = shorten(violation.description, MAX_TEXT_BYTES)
        field = shorten(violation.field, MAX_TEXT_BYTES)
        yield error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
    if len(shown) < len(violations):
        more = f"{len(violations) - len(shown)} more fields are wrong"
        yield error_details_pb2.BadRequest.FieldViolation(field="request", description=more)


def _packed(details: Iterable[Message]) -> Iterator[PackedDetail]:
    for detail in details:
        packed = PackedDetail()
        packed.Pack(detail)
        yield packed


def shorten(text: str, limit_bytes: int) -> str:
    """The text, or its beginning and "..." in at most `limit_bytes` of UTF-8; lone surrogates become "?"."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit_bytes:
        return encoded.decode()
    return encoded[: limit_bytes - 3].decode(errors="ignore") + "..."


def error_from_rpc(error: grpc.aio.AioRpcError) -> EaselError:
    """The EaselError that a server put into a status; without details, the nearest one by code."""
    message = error.details() or f"the call ended with {error.code().name}"
    details = _raw_details(error)
    info = _detail(details, error_details_pb2.ErrorInfo())
    bad_request = _detail(details, error_details_pb2.BadRequest())
    retry = _detail(details, error_details_pb2.RetryInfo())
    if bad_request is not None:
        return InvalidRequest([Violation(v.field, v.description) for v in bad_request.field_violations])
    retry_after_ms = retry.retry_delay.ToMilliseconds() if retry is not None else None
    if info is not None and info.domain == DOMAIN:
        return _by_reason(info.reason, error.code(), message, retry_after_ms)
    return _by_transport(error.code(), message, retry_after_ms)


def said_by_easel(error: grpc.aio.AioRpcError) -> bool:
    """True when Easel code at the other end wrote this status; False when the transport made it up."""
    info = _detail(_raw_details(error), error_details_pb2.ErrorInfo())
    return info is not None and info.domain == DOMAIN


def _by_reason(reason: str, code: grpc.StatusCode, message: str, retry_after_ms: int | None) -> EaselError:
    for kind in _kinds(EaselError):
        if kind.reason == reason and kind is not InvalidRequest:
            return kind(message, retry_after_ms=retry_after_ms)
    return _BY_CODE.get(code, EaselError)(message, retry_after_ms=retry_after_ms)


def _kinds(root: type[EaselError]) -> Iterator[type[EaselError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)


def _by_transport(code: grpc.StatusCode, message: str, retry_after_ms: int | None) -> EaselError:
    lowered = message.lower()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in lowered:
        return InvalidRequest([Violation("request", f"is too large for the server: {message}")])
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest([Violation("request", message)])
    if code in _BROKEN_CODES and any(sign in lowered for sign in _BROKEN_STREAM):
        return Unavailable(message, retry_after_ms=retry_after_ms)
    if code in _BY_CODE:
        return _BY_CODE[code](message, retry_after_ms=retry_after_ms)
    return EaselError(f"{code.name}: {message}", retry_after_ms=retry_after_ms)


def _detail(details: Iterable[PackedDetail], kind: Detail) -> Detail | None:
    return kind if any(_unpack(detail, kind) for detail in details) else None


def _unpack(detail: PackedDetail, kind: Message) -> bool:
    try:
        return detail.Unpack(kind)
    except DecodeError:
        return False


def _raw_details(error: grpc.aio.AioRpcError) -> list[PackedDetail]:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
