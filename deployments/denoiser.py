"""The internal gRPC service of a replica: the runs on its engine, and how they go on elsewhere when it cannot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, cast

import grpc

from cluster.config import Settings
from cluster.errors import (
    DeadlineExceeded,
    EaselError,
    EngineError,
    JobCancelled,
    JobReleased,
    StaleEpoch,
    TransitionError,
    Unavailable,
)
from cluster.jobs.records import AssignedJob
from cluster.jobs.states import AttemptEnd
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.telemetry import metrics
from cluster.telemetry.telemetry import Telemetry
from cluster.telemetry.tracing import traceparent_in
from deployments.attempt import Attempt, Release, Workshop, attempt_key
from deployments.engine.api import Engine, StepReport
from deployments.load import Tally
from deployments.membership import Membership
from deployments.step_loop import Checkpoints, StepLoop
from deployments.watchdog import StepWatchdog
from deployments.writing import persist

logger = logging.getLogger(__name__)

CLAIM_PATIENCE_S = 5.0
# Leaving the slot table is one call to Redis; it gets this much even where draining gets no time.
LEAVE_PATIENCE_S = 2.0
# The router's clock rings for the same deadline, and its reset can be here a moment before our own.
DEADLINE_SLACK_S = 0.05


class Denoiser(pb_grpc.DenoiserServicer):
    """Owns the step loop, the runs on it, and the replica's leave: drained, or at once when the engine is lost.

    A run outlives the stream that brought it; see deployments/attempt.py.
    """

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        decode: Callable[[Sequence[int]], str],
        *,
        membership: Membership,
        settings: Settings,
        telemetry: Telemetry,
    ) -> None:
        self._engine = engine
        self._name = membership.name
        self._membership = membership
        self._settings = settings
        self._attempts: dict[str, Attempt] = {}
        self._unclaimed: dict[str, float] = {}
        self._preempted: frozenset[str] = frozenset()
        self._turning_away = False
        self._failure: EngineError | None = None
        self._beside: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._steps = StepLoop(
            engine,
            on_report=lambda *made: self._from_thread(self._deliver, *made),
            on_failure=lambda failure: self._from_thread(self._lose, AttemptEnd.ENGINE, failure),
            checkpoint_every_steps=settings.denoiser.checkpoint_every_steps,
            on_step=partial(telemetry.recorder.observe, metrics.STEP_DURATION),
        )
        self.tally = Tally()
        patience_s = settings.state.outage_patience_s
        self._shop = Workshop(self._steps, store, engine.card, decode, patience_s, telemetry, self.tally)
        self._watchdog = StepWatchdog(
            lambda: self._steps.busy_s, timeout_s=settings.denoiser.step_timeout_s, on_hung=self._hung
        )
        self._steps.begin()
        self._watchdog.begin()

    def check(self) -> None:
        """Raise EngineError when the engine is broken, given up or lost; the replica leaves then, if it has not."""
        lost = None if self._failure is not None else self._engine.lost()
        if lost is not None:
            self._lose(AttemptEnd.ENGINE, EngineError(f"the engine was lost while it was idle: {lost}"))
        if self._failure is not None:
            raise self._failure

    def running(self) -> frozenset[str]:
        """Keys of the runs at this moment, for `reconcile`."""
        return frozenset(self._attempts)

    def ended(self, job_id: str, how: str) -> None:
        """Redis says that this job was cancelled, or failed by its router: it stops before the next denoising step."""
        error: EaselError = JobCancelled(f"job {job_id} was cancelled")
        if how == "failed":
            error = TransitionError(f"job {job_id} was ended by its router")
        for attempt in self._attempts.values():
            if attempt.assignment.job_id == job_id:
                attempt.stop(error)

    def reaped(self, job: AssignedJob) -> None:
        """Its router has put this job back into the queue."""
        attempt = self._attempts.get(attempt_key(job))
        if attempt is not None:
            attempt.stop(StaleEpoch(f"job {job.job_id} was taken from {self._name}"))

    def preempt(self, job: AssignedJob) -> None:
        """A more urgent job needs this one's slot: it goes at the next step, or as soon as its router brings it."""
        key = attempt_key(job)
        self._preempted |= {key}
        if key in self._attempts:
            self._attempts[key].release(Release(AttemptEnd.PREEMPTED, "a more urgent job took its slot"))

    def reconcile(self, assigned: Sequence[AssignedJob], known: frozenset[str]) -> None:
        """Stop runs, out of those `known` when the heartbeat left, that Redis no longer assigns to this replica."""
        for key in known - {attempt_key(job) for job in assigned}:
            attempt = self._attempts.get(key)
            if attempt is not None:
                attempt.stop(StaleEpoch(f"job {attempt.assignment.job_id} is no longer assigned to {self._name}"))
        self._preempted = frozenset()
        for job in assigned:
            if job.preempt:
                self.preempt(job)

    def disown(self, assigned: Sequence[AssignedJob]) -> None:
        """Give back jobs that hold a slot here but that no router has brought within CLAIM_PATIENCE_S.

        Their router died between the assignment and its call; without this they would hold their slots for good.
        """
        now_s = self._loop.time()
        missing = {attempt_key(job): job for job in assigned if attempt_key(job) not in self._attempts}
        self._unclaimed = {key: self._unclaimed.get(key, now_s) for key in missing}
        release = Release(AttemptEnd.UNCLAIMED, "its router never brought it to the replica", hand_over=True)
        for key, since_s in self._unclaimed.items():
            if now_s - since_s > CLAIM_PATIENCE_S:
                self._run_beside(self._give_back(missing[key], release))

    async def drain(self, message: str, timeout_s: float) -> None:
        """Take no more jobs, give back all with their checkpoints, within the bound, and leave the slot table."""
        self._turning_away = True
        for attempt in self._attempts.values():
            attempt.release(Release(AttemptEnd.DRAINED, message))
        runs = [attempt.task for attempt in self._attempts.values()]
        if runs:
            await asyncio.wait(runs, timeout=timeout_s)
        await self._leave(AttemptEnd.DRAINED, message, max(timeout_s, LEAVE_PATIENCE_S))

    async def close(self, timeout_s: float) -> None:
        """End what is left and the engine; at most about twice `timeout_s`. Raises EngineError when a step hangs."""
        self._turning_away = True
        await self._watchdog.close()
        left = {*(attempt.task for attempt in self._attempts.values()), *self._beside}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=timeout_s)
        await self._loop.run_in_executor(None, self._steps.close, timeout_s)

    async def Run(  # noqa: N802 - named by the proto
        self, request: pb.RunRequest, context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunEvent]
    ) -> AsyncIterator[pb.RunEvent]:
        """Denoise an assigned job; see denoiser.proto. A stream that breaks has the job given back."""
        attempt = await self._begin(request, traceparent_in(cast("Any", context.invocation_metadata())))
        try:
            async with aclosing(attempt.outbox.read()) as events:
                async for event in events:
                    yield event
            await attempt.result()
        except (asyncio.CancelledError, GeneratorExit):
            attempt.outbox.leave()
            if _at_deadline(context):
                attempt.fail(DeadlineExceeded("the deadline passed"))
            else:
                attempt.release(Release(AttemptEnd.ROUTER_LOST, "the router's stream broke", hand_over=True))
            raise

    async def _begin(self, request: pb.RunRequest, traceparent: str) -> Attempt:
        spec = convert.job_spec_from_proto(request.spec)
        job = AssignedJob(spec.job_id, request.epoch)
        key = attempt_key(job)
        if key in self._attempts:
            raise TransitionError(f"job {job.job_id} runs already on {self._name} under epoch {job.epoch}")
        if self._turning_away:
            await self._turn_away(job)
        attempt = self._attempts[key] = Attempt(self._shop, spec, request, traceparent)
        attempt.task.add_done_callback(lambda done: self._over(key, done))
        if key in self._preempted:
            self.preempt(job)
        return attempt

    async def _turn_away(self, job: AssignedJob) -> NoReturn:
        """Redis assigned it a moment before it knew that this replica goes."""
        message = f"replica {self._name} takes no more jobs"
        release = self._shop.store.release
        await persist(lambda: release(job.job_id, job.epoch, AttemptEnd.DRAINED, message), self._shop.patience_s)
        raise JobReleased(f"job {job.job_id}: {message}")

    def _over(self, key: str, done: asyncio.Task[None]) -> None:
        del self._attempts[key]
        error = None if done.cancelled() else done.exception()
        if isinstance(error, EaselError):
            logger.info("run %s ended: %s", key, error)
        elif error is not None:
            logger.error("run %s: an unexpected error; the job is given back as unclaimed", key, exc_info=error)

    def _from_thread(self, call: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    def _deliver(self, report: StepReport, checkpoints: Checkpoints) -> None:
        for progress in report.progress:
            if progress.job_id in self._attempts:
                self._attempts[progress.job_id].progressed(progress)
        for commit in report.commits:
            if commit.job_id in self._attempts:
                self._attempts[commit.job_id].committed(commit)
        for key, checkpoint in checkpoints.items():
            if key in self._attempts:
                self._attempts[key].checkpointed(checkpoint)

    def _hung(self, busy_s: float) -> None:
        limit_s = self._settings.denoiser.step_timeout_s
        failure = EngineError(f"a denoising step has run for {busy_s:.1f} s; denoiser.step_timeout_s is {limit_s}")
        self._steps.abandon(failure)
        self._lose(AttemptEnd.STEP_HUNG, failure)

    def _lose(self, end: AttemptEnd, failure: EngineError) -> None:
        """The engine is gone: leave at once, with all jobs."""
        if self._failure is None:
            self._failure, self._turning_away = failure, True
            logger.error("replica %s: %s", self._name, failure, exc_info=failure.__cause__)
            self._run_beside(self._leave(end, str(failure), self._shop.patience_s))

    async def _leave(self, end: AttemptEnd, message: str, patience_s: float) -> None:
        """Leave the slot table, then end the runs that are left: their jobs are in the queue again."""
        told: EaselError = JobReleased(f"the replica left: {message}")
        try:
            async with asyncio.timeout(patience_s):
                await self._membership.leave(end, message, patience_s)
        except (EaselError, TimeoutError) as error:
            logger.warning("replica %s is left to its lease: %s", self._name, error)
            told = Unavailable(f"the replica left: {message}", retry_after_ms=1000)
        for attempt in self._attempts.values():
            attempt.stop(told)

    def _run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _give_back(self, job: AssignedJob, release: Release) -> None:
        store, hand_over = self._shop.store, release.hand_over
        try:
            await store.release(job.job_id, job.epoch, release.end, release.message, hand_over=hand_over)
        except TransitionError:
            pass  # Redis has moved on
        except EaselError as error:
            logger.warning("job %s could not be given back, and is tried again: %s", job.job_id, error)


def _at_deadline(context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunEvent]) -> bool:
    remaining_s = context.time_remaining()
    return remaining_s is not None and remaining_s <= DEADLINE_SLACK_S
