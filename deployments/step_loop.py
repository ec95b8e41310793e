"""The thread that drives an engine: one denoising step after another, with starts and stops in between.

It runs apart from the replica's event loop, so that a step never waits for a network and a network never for a step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from cluster.errors import EngineError
from deployments.engine.api import Engine, EngineJob, StepReport


class StepLoop:
    """Owns the engine's thread, and the engine's end.

    Invariant: every engine call after `begin` happens on the one thread. `on_report` and `on_failure` are called on
    that thread and must hand over at once (loop.call_soon_threadsafe).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_report: Callable[[StepReport], None],
        on_failure: Callable[[EngineError], None],
    ) -> None:
        self._engine = engine
        self._on_report = on_report
        self._on_failure = on_failure
        self._wake = threading.Condition()
        self._starts: deque[tuple[EngineJob, Future[None]]] = deque()
        self._stops: deque[str] = deque()
        self._closing = False
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)

    @property
    def failure(self) -> EngineError | None:
        """Why the engine is broken, or None."""
        return self._failure

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def start(self, job: EngineJob) -> Future[None]:
        """Start a job at the next step boundary at which a slot is free; the future ends when it is in.

        It carries the engine's ValueError or KeyError when the job is refused, EngineError when the engine is broken.
        """
        future: Future[None] = Future()
        with self._wake:
            refusal = self._failure or (EngineError("the replica is shutting down") if self._closing else None)
            if refusal is None:
                self._starts.append((job, future))
                self._wake.notify()
        if refusal is not None:
            future.set_exception(refusal)
        return future

    def stop(self, job_id: str) -> None:
        """Let go of a job at the next step boundary, or before it starts."""
        with self._wake:
            waiting = [entry for entry in self._starts if entry[0].job_id == job_id]
            for entry in waiting:
                self._starts.remove(entry)
            self._stops.append(job_id)
            self._wake.notify()
        for _, future in waiting:
            future.cancel()

    def close(self, timeout_s: float) -> None:
        """End the thread and close the engine. Raises EngineError when a step hangs beyond the bound."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._refuse_waiting(EngineError("the replica is shutting down"))
        if self._thread.is_alive():
            raise EngineError(f"the engine did not finish its step within {timeout_s} s")
        self._engine.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # noqa: BLE001 - the step-loop edge: whatever broke the engine ends the replica
            failure = EngineError(f"the engine failed at a denoising step: {type(error).__name__}: {error}")
            failure.__cause__ = error
            with self._wake:
                self._failure = failure
            self._refuse_waiting(failure)
            self._on_failure(failure)

    def _turn(self) -> bool:
        with self._wake:
            while not (self._closing or self._starts or self._stops or self._engine.stats().active_jobs):
                self._wake.wait()
            if self._closing:
                return False
            stops, self._stops = self._stops, deque()
        for job_id in stops:
            self._engine.stop(job_id)
        self._admit()
        if self._engine.stats().active_jobs:
            self._on_report(self._engine.step())
        return True

    def _admit(self) -> None:
        while self._engine.stats().active_jobs < self._engine.slots:
            with self._wake:
                if not self._starts:
                    return
                job, future = self._starts.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._engine.start(job)
            except (ValueError, KeyError) as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _refuse_waiting(self, error: EngineError) -> None:
        with self._wake:
            waiting, self._starts = self._starts, deque()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
