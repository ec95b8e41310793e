"""The thread that drives an engine: one denoising step after another, with starts, stops and releases in between.

It runs apart from the replica's event loop, so that a step never waits for a network and a network never for a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from cluster.errors import EngineError
from deployments.engine.api import CanvasCheckpoint, Engine, EngineJob, StepReport

logger = logging.getLogger(__name__)

Checkpoints = Mapping[str, CanvasCheckpoint]
Released = Future[CanvasCheckpoint | None]
Answer = TypeVar("Answer")


class StepLoop:
    """Owns the engine's thread, and the engine's end.

    Invariants: every engine call after `begin` happens on the one thread. `on_report` and `on_failure` are called on
    that thread and must hand over at once (loop.call_soon_threadsafe). The future of a release ends after `on_report`
    was called for every step before it. Once abandoned, the thread calls nothing any more.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_report: Callable[[StepReport, Checkpoints], None],
        on_failure: Callable[[EngineError], None],
        checkpoint_every_steps: int = 0,
        on_step: Callable[[float], None] = lambda took_s: None,
    ) -> None:
        """With `checkpoint_every_steps` above 0, every so many steps of a canvas are reported with its checkpoint.

        `on_step` hears on the thread how long each step took, in seconds.
        """
        self._engine = engine
        self._on_report = on_report
        self._on_failure = on_failure
        self._every_steps = checkpoint_every_steps
        self._on_step = on_step
        self._wake = threading.Condition()
        self._starts: deque[tuple[EngineJob, Future[None]]] = deque()
        self._stops: deque[str] = deque()
        self._releases: deque[tuple[str, Released]] = deque()
        self._answering: Future[None] | Released | None = None
        self._closing = False
        self._abandoned = False
        self._busy_since_s: float | None = None
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)

    @property
    def failure(self) -> EngineError | None:
        """Why the engine is broken, or None."""
        return self._failure

    @property
    def busy_s(self) -> float:
        """How long the thread has been with the engine since it last came to a step boundary; 0 while it waits."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def start(self, job: EngineJob) -> Future[None]:
        """Start a job at the next step boundary at which a slot is free; the future ends when it is in.

        A checkpoint that the engine refuses is left out: the canvas is then denoised from its start. The future carries
        the engine's ValueError or KeyError when the job itself is refused, EngineError when the engine is broken.
        """
        future: Future[None] = Future()
        with self._wake:
            refusal = self._refusal()
            if refusal is None:
                self._starts.append((job, future))
                self._wake.notify()
        if refusal is not None:
            future.set_exception(refusal)
        return future

    def stop(self, job_id: str) -> None:
        """Let go of a job at the next step boundary, or before it starts."""
        with self._wake:
            waiting = self._take_waiting(job_id)
            self._stops.append(job_id)
            self._wake.notify()
        for future in waiting:
            future.cancel()

    def release(self, job_id: str) -> Released:
        """Stop a job at the next step boundary and give its canvas in progress.

        None for a job that waits to start (it never does then), is unknown, or is at a canvas boundary. The future
        carries EngineError when the engine is broken.
        """
        future: Released = Future()
        with self._wake:
            waiting = self._take_waiting(job_id)
            refusal = self._refusal()
            if not waiting and refusal is None:
                self._releases.append((job_id, future))
                self._wake.notify()
        if waiting:
            future.set_result(None)
        elif refusal is not None:
            future.set_exception(refusal)
        for start in waiting:
            start.cancel()
        return future

    def abandon(self, failure: EngineError) -> None:
        """Give up on a thread that hangs in the engine; should it come back, it does nothing and ends."""
        with self._wake:
            self._abandoned = True
            self._failure = self._failure or failure
            self._wake.notify()
        self._refuse_waiting(failure)

    def close(self, timeout_s: float) -> None:
        """End the thread and close the engine. Raises EngineError when a step hangs, at the latest after the bound.

        An engine that hangs is left as it is: it ends with its process.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(0.0 if self._abandoned else timeout_s)
        self._refuse_waiting(EngineError("the replica is shutting down"))
        if self._thread.is_alive():
            raise EngineError(f"the engine is not closed: its step does not end (waited {timeout_s} s)")
        self._engine.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # noqa: BLE001 - the step-loop edge: whatever broke the engine ends the replica
            failure = EngineError(f"the engine failed at a denoising step: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._broke(failure)
        finally:
            self._busy_since_s = None

    def _broke(self, failure: EngineError) -> None:
        with self._wake:
            if self._abandoned:
                return
            self._failure = failure
        self._refuse_waiting(failure)
        self._on_failure(failure)

    def _turn(self) -> bool:
        """From one step boundary to the next; False when there is to be no other."""
        with self._wake:
            self._busy_since_s = None
            while not (self._ending() or self._asked() or self._engine.stats().active_jobs):
                self._wake.wait()
            if self._ending():
                return False
            self._busy_since_s = time.monotonic()
            stops, self._stops = self._stops, deque()
        for job_id in stops:
            self._engine.stop(job_id)
        self._let_go()
        self._admit()
        if self._engine.stats().active_jobs and not self._abandoned:
            self._step()
        return True

    def _step(self) -> None:
        began_s = time.monotonic()
        report = self._engine.step()
        self._on_step(time.monotonic() - began_s)
        checkpoints = self._checkpoints(report) if self._every_steps else {}
        with self._wake:
            # Under the lock, so that nothing is reported once `abandon` has returned.
            if not self._abandoned:
                self._on_report(report, checkpoints)

    def _checkpoints(self, report: StepReport) -> dict[str, CanvasCheckpoint]:
        """Of the canvases that are due; one that was committed in this step is at its boundary, or gone."""
        committed = {commit.job_id for commit in report.commits}
        found = {}
        for progress in report.progress:
            if progress.step % self._every_steps == 0 and progress.job_id not in committed:
                found[progress.job_id] = self._engine.checkpoint(progress.job_id)
        return {job_id: checkpoint for job_id, checkpoint in found.items() if checkpoint is not None}

    def _let_go(self) -> None:
        while not self._abandoned:
            with self._wake:
                if not self._releases:
                    return
                job_id, future = self._releases.popleft()
                self._answering = future
            try:
                checkpoint = self._engine.checkpoint(job_id)
            except KeyError:  # it has just ended, or never came
                checkpoint = None
            self._engine.stop(job_id)
            _answer(future, checkpoint)

    def _admit(self) -> None:
        while self._engine.stats().active_jobs < self._engine.slots and not self._abandoned:
            with self._wake:
                if not self._starts:
                    return
                job, future = self._starts.popleft()
                self._answering = future
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._start(job)
            except (ValueError, KeyError) as error:
                _refuse(future, error)
            else:
                _answer(future, None)

    def _start(self, job: EngineJob) -> None:
        try:
            self._engine.start(job)
        except ValueError as error:
            if job.checkpoint is None:
                raise
            again = replace(job, checkpoint=None)
            self._engine.start(again)
            logger.warning("job %s: its canvas %d starts again: %s", job.job_id, job.checkpoint.canvas_index, error)

    def _asked(self) -> bool:
        return bool(self._starts or self._stops or self._releases)

    def _ending(self) -> bool:
        return self._closing or self._abandoned

    def _refusal(self) -> EngineError | None:
        return self._failure or (EngineError("the replica is shutting down") if self._closing else None)

    def _take_waiting(self, job_id: str) -> list[Future[None]]:
        """Take a job's start out of the queue, under the lock."""
        waiting = [entry for entry in self._starts if entry[0].job_id == job_id]
        for entry in waiting:
            self._starts.remove(entry)
        return [future for _, future in waiting]

    def _refuse_waiting(self, error: EngineError) -> None:
        """End every future that nobody will answer any more, with that of the call which broke or hangs."""
        with self._wake:
            waiting: list[Future[None] | Released] = [future for _, future in self._starts]
            waiting += [future for _, future in self._releases]
            if self._answering is not None:
                waiting.append(self._answering)
            self._starts.clear()
            self._releases.clear()
        for future in waiting:
            _refuse(future, error)


def _answer(future: Future[Answer], answer: Answer) -> None:
    # It may be cancelled, or refused by `abandon` while the engine hung.
    with suppress(InvalidStateError):
        future.set_result(answer)


def _refuse(future: Future[Any], error: Exception) -> None:
    with suppress(InvalidStateError):
        future.set_exception(error)
