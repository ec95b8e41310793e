"""What a router tells of a job in its charge: how long it waited, how it ended, and the spans of job and attempts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.core import JobSpec, Placement
from cluster.errors import EaselError, JobCancelled, Unavailable
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.telemetry import metrics
from cluster.telemetry.telemetry import Telemetry
from cluster.telemetry.tracing import METADATA_KEY, Span, Unwritten, job_span

Outcome = v1.GenerateEvent | EaselError | None


class AttemptSpan:
    """One assignment, as its router sees it. `metadata` goes with the call to the replica."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.metadata = ((METADATA_KEY, span.traceparent),) if span.traceparent else ()
        self.error: str | None = None

    def end(self) -> None:
        """The stream is over."""
        self._span.end(error=self.error)


class JobWatch:
    """Of one charge. `waited_s` is how long the job was there when this router got it.

    The job's span is written at its end, by the router that has charge of it then, under an id known from the start:
    so it covers the whole job even when the router that accepted it is gone.
    """

    def __init__(self, telemetry: Telemetry, spec: JobSpec, waited_s: float) -> None:
        self._telemetry = telemetry
        self._spec = spec
        self._as_span = job_span(spec.traceparent, spec.job_id)
        self._submitted_s = time.monotonic() - waited_s
        self._submitted_ns = time.time_ns() - int(waited_s * 1e9)
        self._is_ours = True

    @contextmanager
    def attempt(self, placement: Placement) -> Iterator[AttemptSpan]:
        """While the job streams from a replica under one epoch."""
        if placement.epoch == 1:
            waited_s = time.monotonic() - self._submitted_s
            self._telemetry.recorder.observe(metrics.QUEUE_WAIT, waited_s, priority=self._spec.priority.name.lower())
        attempt = AttemptSpan(self._start(placement))
        try:
            yield attempt
        except EaselError as error:
            attempt.error = error.reason
            raise
        finally:
            attempt.end()

    def follows(self) -> None:
        """Another router has charge of the job, and tells of its end."""
        self._is_ours = False

    def over(self, outcome: Outcome) -> None:
        """The charge is over. An outcome that only says that this router gives up is not the job's end."""
        if outcome is None or isinstance(outcome, Unavailable) or not self._is_ours:
            return
        word = _word(outcome)
        recorder = self._telemetry.recorder
        recorder.add(metrics.JOBS, outcome=word)
        recorder.observe(metrics.JOB_DURATION, time.monotonic() - self._submitted_s, outcome=word)
        self._write(word, outcome)

    def _start(self, placement: Placement) -> Span:
        if not self._as_span:
            return Unwritten()
        return self._telemetry.tracer.start(
            "attempt",
            parent=self._as_span,
            kind="client",
            attributes={
                "easel.epoch": placement.epoch,
                "easel.replica": placement.replica,
                "easel.router": placement.router,
                "easel.committed_canvases": placement.committed_canvases,
            },
        )

    def _write(self, word: str, outcome: v1.GenerateEvent | EaselError) -> None:
        if not self._as_span:
            return
        span = self._telemetry.tracer.start(
            "job",
            parent=self._spec.traceparent,
            started_ns=self._submitted_ns,
            as_span=self._as_span,
            attributes={
                "easel.job_id": self._spec.job_id,
                "easel.priority": self._spec.priority.name.lower(),
                "easel.prompt_tokens": len(self._spec.prompt_tokens),
                "easel.outcome": word,
            },
        )
        span.end(error=str(outcome) if isinstance(outcome, EaselError) else None)


def _word(outcome: v1.GenerateEvent | EaselError) -> str:
    if isinstance(outcome, JobCancelled):
        return "cancelled"
    return outcome.reason if isinstance(outcome, EaselError) else "succeeded"
