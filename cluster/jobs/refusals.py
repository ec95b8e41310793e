"""What the scripts refuse, as errors that name the job, its state and what was tried."""

from __future__ import annotations

from redis.exceptions import ResponseError

from cluster.errors import (
    EaselError,
    JobNotFound,
    QueueFull,
    QuotaExceeded,
    ReplicaNotFound,
    RequestIdReused,
    StaleEpoch,
    TransitionError,
)


def refusal(error: ResponseError, job_id: str, tried: str, *, retry_after_ms: int) -> EaselError | None:
    """The error for a script's `<CODE> <state> <epoch> ...`; None when it is not one of ours (a bug in a
    script).
    """
    code, state, epoch, next_index, *_ = [*str(error).split(), "", "", ""]
    refused = f"job {job_id}: {tried} was refused: the job is {state}"
    match code:
        case "JOB_NOT_FOUND":
            known: EaselError | None = not_found(job_id)
        case "STALE_EPOCH":
            known = StaleEpoch(f"{refused} under epoch {epoch}")
        case "ILLEGAL_TRANSITION":
            known = TransitionError(refused)
        case "CANVAS_OUT_OF_ORDER":
            known = TransitionError(f"{refused} and its next canvas is {next_index}")
        case "REQUEST_ID_REUSED":
            known = RequestIdReused(f"request id {job_id} belongs to a job with another body; use a new id")
        case "REPLICA_NOT_FOUND":
            known = ReplicaNotFound(f"no replica {tried}: see `easel status` for those that are there")
        case "QUOTA_EXCEEDED":
            known = _over_quota(state, epoch, int(next_index) or retry_after_ms)
        case "QUEUE_FULL":
            known = _queue_full(retry_after_ms)
        case "IMAGES_FULL":
            full = "the images of jobs that have not ended take all of state.image_limit_bytes"
            known = QueueFull(f"{full}; come back in {retry_after_ms} ms", retry_after_ms=retry_after_ms)
        case _:
            known = None
    return known


def not_found(job_id: str) -> JobNotFound:
    """No such job, or no longer."""
    return JobNotFound(f"no job {job_id}: it was never submitted, or its record has expired")


def _over_quota(name: str, limit: str, retry_after_ms: int) -> QuotaExceeded:
    what = {"queued_jobs": "jobs waiting", "requests_per_s": "requests a second"}[name]
    message = f"the tenant has its {limit} {what} (security.quotas: {name}); come back in {retry_after_ms} ms"
    return QuotaExceeded(message, retry_after_ms=retry_after_ms)


def _queue_full(retry_after_ms: int) -> QueueFull:
    return QueueFull(f"the queue is full; come back in {retry_after_ms} ms", retry_after_ms=retry_after_ms)
