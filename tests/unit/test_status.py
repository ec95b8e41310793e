"""Errors keep their type and their details over the wire."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import code_pb2  # type: ignore[import-untyped]  # ships no py.typed

from cluster import errors
from cluster.core import Violation
from cluster.errors import EaselError, InvalidRequest, QueueFull, Unavailable
from cluster.rpc.status import MAX_VIOLATIONS, error_from_rpc, shorten, status_of

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EaselError)]


def sent(error: EaselError) -> grpc.aio.AioRpcError:
    """What a client's call raises for an error that a handler raised."""
    status = status_of(error)
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(error.code, trailing_metadata=metadata, details=status.message)


def bare(code: grpc.StatusCode, details: str) -> EaselError:
    """What a client makes of a status without details."""
    return error_from_rpc(grpc.aio.AioRpcError(code, details=details))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not InvalidRequest])
def test_every_error_of_the_tree_comes_back_as_itself(kind: type[EaselError]) -> None:
    error = error_from_rpc(sent(kind("what happened", retry_after_ms=1500)))
    assert type(error) is kind
    assert (str(error), error.retry_after_ms, error.retryable) == ("what happened", 1500, kind.retryable)


def test_reasons_are_unique() -> None:
    assert len({kind.reason for kind in KINDS}) == len(KINDS)


def test_violations_come_back_as_they_were() -> None:
    violations = (Violation("text", "is empty"), Violation("sampling.t_min", "is 0"))
    error = error_from_rpc(sent(InvalidRequest(violations)))
    assert isinstance(error, InvalidRequest)
    assert error.violations == violations


def test_a_status_has_code_reason_and_domain() -> None:
    status = status_of(QueueFull("the queue is full", retry_after_ms=1000))
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    kinds = [detail.type_url.rsplit(".", 1)[-1] for detail in status.details]
    assert kinds == ["ErrorInfo", "RetryInfo"]


def test_a_status_stays_small_whatever_is_wrong_with_a_request() -> None:
    many = [Violation(f"messages[{n}].content", "ü" * 5000) for n in range(10_000)]
    status = status_of(InvalidRequest(many))
    assert len(status.SerializeToString()) + 3 * len(status.message.encode()) < 8000
    error = error_from_rpc(sent(InvalidRequest(many)))
    assert isinstance(error, InvalidRequest)
    assert len(error.violations) == MAX_VIOLATIONS
    assert error.violations[-1].description == f"{10_000 - MAX_VIOLATIONS + 1} more fields are wrong"


def test_a_message_is_one_line() -> None:
    assert status_of(EaselError("one\ntwo")).message == "one two"


def test_text_is_cut_at_a_character() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("äöü", 5) == "ä..."
    assert shorten("a\ud800", 10) == "a?"


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", Unavailable),
        (grpc.StatusCode.UNKNOWN, "Stream removed", Unavailable),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", Unavailable),
        (grpc.StatusCode.UNAVAILABLE, "Stream removed (recvmsg:Connection reset by peer (104))", Unavailable),
        (grpc.StatusCode.UNAVAILABLE, "Cancelling all calls", Unavailable),
        (grpc.StatusCode.UNKNOWN, "recvmsg:Connection reset by peer", Unavailable),
        (grpc.StatusCode.INTERNAL, "sendmsg: Broken pipe (32)", Unavailable),
        (grpc.StatusCode.UNKNOWN, "Endpoint closing", Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received RST_STREAM with error code 11", Unavailable),
        (grpc.StatusCode.CANCELLED, "Received RST_STREAM with error code 8", Unavailable),
        (grpc.StatusCode.CANCELLED, "CANCELLED", Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down", QueueFull),
        (grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>", EaselError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceeded),
        (grpc.StatusCode.INVALID_ARGUMENT, "no", InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 4)", InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", EaselError),
    ],
)
def test_a_bare_status_becomes_the_nearest_error(code: grpc.StatusCode, details: str, kind: type[EaselError]) -> None:
    error = bare(code, details)
    assert type(error) is kind
    assert details in str(error)


def test_damaged_details_are_no_reason_to_fail() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, trailing_metadata=metadata, details="gone")
    assert isinstance(error_from_rpc(error), Unavailable)
