"""The one error tree: every error says its gRPC status, and whether the same call may succeed later."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from cluster.core import Violation


class EaselError(Exception):
    """Base of every error Easel raises on purpose. `str(error)` is one line made for the caller to read."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    retryable: bool = False
    reason: str = "INTERNAL"

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class InvalidRequest(EaselError):
    """The request breaks a limit; `violations` names each bad field."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


class EngineCannot(EaselError):
    """The request is sound, but the engine of this cluster, or its checkpoint, cannot do what it asks for."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ENGINE_CANNOT"


class JobNotFound(EaselError):
    """No job has this id, or its record has expired."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "JOB_NOT_FOUND"


class ReplicaNotFound(EaselError):
    """No replica has this id, or it has left."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "REPLICA_NOT_FOUND"


class RequestIdReused(EaselError):
    """The request id belongs to a job with another body."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "REQUEST_ID_REUSED"


class QueueFull(EaselError):
    """The queue limit is reached; come back after `retry_after_ms`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True
    reason = "QUEUE_FULL"


class QuotaExceeded(EaselError):
    """A tenant has as much as it may have; the message names the limit. Come back after `retry_after_ms`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True
    reason = "QUOTA_EXCEEDED"


class Unauthenticated(EaselError):
    """The call brings no credential, or one that the cluster does not accept."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(EaselError):
    """The credential does not allow this; the message names the field or the call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class Unavailable(EaselError):
    """A part of the cluster cannot be reached now."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True
    reason = "UNAVAILABLE"


class DeadlineExceeded(EaselError):
    """The job's deadline passed before its answer was whole."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class JobCancelled(EaselError):
    """The job was cancelled by its caller."""

    code = grpc.StatusCode.CANCELLED
    reason = "JOB_CANCELLED"


class JobFailed(EaselError):
    """The job ended without an answer; the message holds the reason."""

    code = grpc.StatusCode.ABORTED
    reason = "JOB_FAILED"


class TransitionError(EaselError):
    """A job cannot make this move from the state it is in."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ILLEGAL_TRANSITION"


class StaleEpoch(TransitionError):
    """The writer's epoch is old: the job has been assigned again since, or has ended."""

    reason = "STALE_EPOCH"


class JobReleased(EaselError):
    """A run ended before its job did: the job is back in the queue, and goes on elsewhere. Never leaves the cluster."""

    code = grpc.StatusCode.ABORTED
    retryable = True
    reason = "JOB_RELEASED"


class CheckpointError(EaselError):
    """A checkpoint folder cannot be served: missing, truncated, of another architecture, or incomplete."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BAD_CHECKPOINT"


class ConfigError(EaselError):
    """A setting is unknown or out of range."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "BAD_CONFIG"


class StartupError(EaselError):
    """The cluster cannot come up: a port is taken, Redis is down, or a cluster already runs."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STARTUP"


class EngineError(EaselError):
    """The engine of a replica broke; its jobs cannot go on there."""

    code = grpc.StatusCode.INTERNAL
    retryable = True
    reason = "ENGINE"
