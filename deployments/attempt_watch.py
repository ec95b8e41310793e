"""What a replica tells of one run: how the job came back after an interruption, and the spans of run and canvases."""

from __future__ import annotations

import asyncio
import time

from cluster.core import Canvas, JobSpec
from cluster.errors import EaselError
from cluster.jobs.records import JobRecord
from cluster.jobs.states import AttemptEnd
from cluster.telemetry import metrics
from cluster.telemetry.telemetry import Telemetry
from cluster.telemetry.tracing import Attributes, Kind, Span, Unwritten
from deployments.engine.api import Progress


class AttemptWatch:
    """Of one attempt. The engine is a canvas ahead of what is committed, so canvases are kept by their index."""

    def __init__(self, telemetry: Telemetry, spec: JobSpec, epoch: int, parent: str) -> None:
        """`parent` is the traceparent that came with the router's call."""
        self._telemetry = telemetry
        self._parent = parent
        self._run: Span = self._start("denoise", parent, {"easel.job_id": spec.job_id, "easel.epoch": epoch})
        self._canvases: dict[int, Span] = {}
        self._interruption: tuple[str, float] | None = None

    def continues(self, record: JobRecord) -> None:
        """An earlier run ended before its job did: `record` is the job, just read, and tells why and when."""
        if not record.history:
            return
        before = record.history[-1]
        ended_s = time.monotonic() - (record.now_ms - before.ended_ms) / 1000
        self._interruption = (before.reason, ended_s)
        _count(self._telemetry, before.reason)
        self._run.event("continues", {"easel.reason": before.reason, "easel.replica": before.replica})

    def stepped(self, progress: Progress) -> None:
        """The engine made a denoising step."""
        if self._interruption is not None:
            (reason, ended_s), self._interruption = self._interruption, None
            self._telemetry.recorder.observe(metrics.FAILOVER, time.monotonic() - ended_s, reason=reason)
        if not self._run.traceparent:
            return
        index = progress.canvas_index
        if index not in self._canvases:
            self._canvases[index] = self._start("canvas", self._run.traceparent, {"easel.first_step": progress.step})
        if self._telemetry.steps:
            told = {"easel.step": progress.step, "easel.mean_entropy": progress.mean_entropy}
            self._canvases[index].event("step", {**told, "easel.accepted_tokens": progress.accepted_tokens})

    def committed(self, canvas: Canvas) -> None:
        """Redis holds a canvas."""
        span = self._canvases.pop(canvas.index, None)
        if span is not None:
            told = {"easel.canvas_index": canvas.index, "easel.denoising_steps": canvas.denoising_steps}
            span.end(attributes={**told, "easel.mean_entropy": canvas.mean_entropy, "easel.tokens": len(canvas.tokens)})

    def over(self, done: asyncio.Task[None]) -> None:
        """The run has ended; what it leaves in progress is replayed or continued elsewhere."""
        error = None if done.cancelled() else done.exception()
        said = "the replica is shutting down" if done.cancelled() else None if error is None else str(error)
        reason = error.reason if isinstance(error, EaselError) else ""
        for index, span in self._canvases.items():
            span.end(error="not committed by this run", attributes={"easel.canvas_index": index})
        self._run.end(error=said, attributes={"easel.reason": reason} if reason else None)

    def _start(self, name: str, parent: str, attributes: Attributes) -> Span:
        if not parent:
            return Unwritten()
        kind: Kind = "server" if name == "denoise" else "internal"
        return self._telemetry.tracer.start(name, parent=parent, kind=kind, attributes=attributes)


def _count(telemetry: Telemetry, reason: str) -> None:
    if reason == AttemptEnd.PREEMPTED:
        telemetry.recorder.add(metrics.PREEMPTIONS)
    elif reason == AttemptEnd.DRAINED:
        telemetry.recorder.add(metrics.DRAINED_JOBS)
    else:
        telemetry.recorder.add(metrics.RETRIES, reason=reason)
