"""How a job ended: an error as Redis stores it, and a stored job in the words of the public contract."""

from __future__ import annotations

import grpc

from cluster.errors import DeadlineExceeded, EaselError, EngineError, JobCancelled, JobFailed, Unavailable
from cluster.jobs.records import JobFailure, JobRecord
from cluster.jobs.states import JobState
from cluster.rpc import convert
from cluster.rpc.easel.v1 import generation_pb2 as v1

_BY_CODE: dict[int, type[EaselError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0]: DeadlineExceeded,
    grpc.StatusCode.INTERNAL.value[0]: EngineError,
}


def ending_of(record: JobRecord) -> v1.GenerateEvent | EaselError:
    """The `finished` event of a job that succeeded, or the error its readers get.

    Raises nothing; a job that has not ended gives Unavailable, since whoever asked expected an end.
    """
    if record.state is JobState.SUCCEEDED and record.finish_reason is not None:
        return convert.finished_event(record.finish_reason, record.usage, record.replica)
    if record.state is JobState.CANCELLED:
        return JobCancelled(f"job {record.job_id} was cancelled")
    if record.state is JobState.FAILED and record.failure is not None:
        kind = _BY_CODE.get(record.failure.code, JobFailed)
        return kind(record.failure.message)
    return Unavailable(f"job {record.job_id} lost its replica and is {record.state.value}", retry_after_ms=1000)


def failure_of(error: EaselError) -> JobFailure:
    """An error as the failure of the job that it ended."""
    return JobFailure(code=error.code.value[0], reason=error.reason, message=str(error))
