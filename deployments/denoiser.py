"""A Denoiser replica: runs assigned jobs on its engine, and commits every canvas before it tells anybody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from cluster.core import Canvas, Draft, FinishReason, Usage
from cluster.errors import EaselError, EngineError, JobCancelled, StaleEpoch, TransitionError, Unavailable
from cluster.jobs.records import AssignedJob, JobFailure
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from deployments.answer import Answer
from deployments.attempt import Attempt, attempt_key
from deployments.endings import failure_of
from deployments.engine.api import Commit, Engine, EngineJob, Progress, StepReport
from deployments.step_loop import StepLoop
from deployments.watch import stored_canvases

logger = logging.getLogger(__name__)

Written = TypeVar("Written")

COMMIT_PATIENCE_S = 5.0
COMMIT_RETRY_S = 0.1
CLAIM_PATIENCE_S = 5.0
# The router's clock rings for the same deadline, and its reset can be here a moment before our own.
DEADLINE_SLACK_S = 0.05


class Denoiser(pb_grpc.DenoiserServicer):
    """The internal gRPC service of a replica, and the owner of its engine and step loop.

    Invariant: a canvas leaves this class only after Redis holds it under this run's epoch.
    """

    def __init__(self, engine: Engine, store: JobStore, decode: Callable[[Sequence[int]], str], *, name: str) -> None:
        self.name = name
        self._engine = engine
        self._store = store
        self._decode = decode
        self._attempts: dict[str, Attempt] = {}
        self._unclaimed: dict[str, float] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._steps = StepLoop(engine, on_report=self._from_thread, on_failure=self._failed_in_thread)
        self._steps.begin()

    @property
    def failure(self) -> EngineError | None:
        """Why the engine is broken, or None while it works."""
        return self._steps.failure

    async def close(self, timeout_s: float) -> None:
        """Stop every run, let the last writes out, and end the engine; at most about twice `timeout_s`."""
        for attempt in list(self._attempts.values()):
            attempt.events.put_nowait(Unavailable("the replica is shutting down", retry_after_ms=1000))
        try:
            await self._loop.run_in_executor(None, self._steps.close, timeout_s)
        finally:
            # After the engine: the runs told above write their endings while it finishes its step.
            if self._endings:
                await asyncio.wait(self._endings, timeout=timeout_s)

    def ended(self, job_id: str, how: str) -> None:
        """Redis says that this job was cancelled, or failed by its router: it stops before the next denoising step."""
        error: EaselError = JobCancelled(f"job {job_id} was cancelled")
        if how == "failed":
            error = TransitionError(f"job {job_id} was ended by its router")
        for attempt in self._attempts.values():
            if attempt.spec.job_id == job_id:
                attempt.events.put_nowait(error)

    def reconcile(self, assigned: Sequence[AssignedJob], known: frozenset[str]) -> None:
        """Stop runs, out of those `known` when the heartbeat left, that Redis no longer assigns to this replica."""
        wanted = {attempt_key(job) for job in assigned}
        for key in known - wanted:
            attempt = self._attempts.get(key)
            if attempt is not None:
                attempt.events.put_nowait(StaleEpoch(f"job {attempt.spec.job_id} is no longer assigned to {self.name}"))

    def disown(self, assigned: Sequence[AssignedJob]) -> None:
        """Fail jobs that hold a slot here but that no router has brought within CLAIM_PATIENCE_S.

        Their router died between the assignment and its call; without this they would hold their slots for good.
        """
        now_s = self._loop.time()
        missing = {attempt_key(job): job for job in assigned if attempt_key(job) not in self._attempts}
        self._unclaimed = {key: self._unclaimed.get(key, now_s) for key in missing}
        for key, since_s in self._unclaimed.items():
            if now_s - since_s > CLAIM_PATIENCE_S:
                self._write_ending(missing[key], _router_lost("its router never brought it to the replica"))

    def running(self) -> frozenset[str]:
        """Keys of the runs at this moment, for `reconcile`."""
        return frozenset(self._attempts)

    async def Run(  # noqa: N802 - named by the proto
        self, request: pb.RunRequest, context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunEvent]
    ) -> AsyncIterator[pb.RunEvent]:
        """Denoise an assigned job; see denoiser.proto."""
        attempt, committed = await self._begin(request)
        try:
            async with aclosing(self._denoise(attempt, committed)) as events:
                async for event in events:
                    yield event
        except (JobCancelled, StaleEpoch, TransitionError):
            raise  # Redis has moved on already: there is nothing to write
        except EaselError as error:
            self._write_ending(attempt.assignment, failure_of(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._write_ending(attempt.assignment, _left_by_caller(context))
            raise
        finally:
            self._attempts.pop(attempt.key, None)
            self._steps.stop(attempt.key)

    async def _begin(self, request: pb.RunRequest) -> tuple[Attempt, list[Canvas]]:
        spec = convert.job_spec_from_proto(request.spec)
        card = self._engine.card
        answer = Answer(
            self._decode,
            max_new_tokens=spec.sampling.max_new_tokens,
            eos_token_ids=card.eos_token_ids,
            stop=spec.stop,
        )
        committed: list[Canvas] = []
        if request.committed_canvases:
            committed = await stored_canvases(self._store, spec.job_id)
        attempt = Attempt(spec, request.epoch, answer, request.drafts)
        self._attempts[attempt.key] = attempt
        return attempt, committed

    async def _denoise(self, attempt: Attempt, committed: list[Canvas]) -> AsyncGenerator[pb.RunEvent, None]:
        for canvas in committed:
            finish = attempt.answer.add(canvas.raw_tokens).finish
            if finish is not None:  # the attempt before this one died between its last commit and its finish
                usage = await self._store.finish(attempt.spec.job_id, attempt.epoch, finish)
                yield pb.RunEvent(finished=_finished(finish, usage))
                return
        self._start_engine(attempt, committed)
        while True:
            item = await attempt.events.get()
            if isinstance(item, EaselError):
                raise item
            if isinstance(item, Progress):
                yield pb.RunEvent(draft=self._draft(item))
                continue
            canvas, ending, usage = await self._commit(attempt, item)
            event = pb.RunEvent(committed=convert.canvas_to_proto(canvas))
            if ending is not None:
                event.finished.CopyFrom(_finished(ending, usage))
            yield event
            if ending is not None:
                return

    def _start_engine(self, attempt: Attempt, committed: list[Canvas]) -> None:
        job = EngineJob(
            job_id=attempt.key,
            prompt_tokens=attempt.spec.prompt_tokens,
            sampling=attempt.spec.sampling,
            committed=tuple(canvas.raw_tokens for canvas in committed),
            wants_drafts=attempt.wants_drafts,
        )
        future = asyncio.wrap_future(self._steps.start(job))
        future.add_done_callback(lambda done: self._started(attempt, done))

    @staticmethod
    def _started(attempt: Attempt, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if isinstance(error, EaselError):
            attempt.events.put_nowait(error)
        elif error is not None:
            attempt.events.put_nowait(EngineError(f"the engine refused job {attempt.spec.job_id}: {error}"))

    async def _commit(self, attempt: Attempt, commit: Commit) -> tuple[Canvas, FinishReason | None, Usage | None]:
        piece = attempt.answer.add(commit.tokens)
        canvas = Canvas(
            index=commit.canvas_index,
            raw_tokens=commit.tokens,
            tokens=piece.tokens,
            text=piece.text,
            denoising_steps=commit.denoising_steps,
            mean_entropy=commit.mean_entropy,
        )
        if commit.last and piece.finish is None:
            raise EngineError(f"the engine ended job {attempt.spec.job_id} before its answer was whole")
        data = convert.canvas_to_proto(canvas).SerializeToString()

        async def write() -> Usage | None:
            return await self._store.commit(
                attempt.spec.job_id,
                attempt.epoch,
                canvas.index,
                data,
                tokens=len(canvas.tokens),
                denoising_steps=canvas.denoising_steps,
                finish=piece.finish,
            )

        usage = await _persist(write)
        return canvas, piece.finish, usage

    def _draft(self, progress: Progress) -> pb.DraftCanvas:
        ends = self._engine.card.eos_token_ids
        tokens = list(progress.draft_tokens)
        end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        return convert.draft_to_proto(
            Draft(
                canvas_index=progress.canvas_index,
                step=progress.step,
                text=self._decode(tokens[:end]),
                mean_entropy=progress.mean_entropy,
                accepted_tokens=progress.accepted_tokens,
            )
        )

    def _from_thread(self, report: StepReport) -> None:
        self._loop.call_soon_threadsafe(self._deliver, report)

    def _deliver(self, report: StepReport) -> None:
        for progress in report.progress:
            attempt = self._attempts.get(progress.job_id)
            if attempt is not None and attempt.wants_drafts:
                attempt.events.put_nowait(progress)
        for commit in report.commits:
            attempt = self._attempts.get(commit.job_id)
            if attempt is not None:
                attempt.events.put_nowait(commit)

    def _failed_in_thread(self, failure: EngineError) -> None:
        self._loop.call_soon_threadsafe(self._fail_all, failure)

    def _fail_all(self, failure: EngineError) -> None:
        logger.error("replica %s: %s", self.name, failure, exc_info=failure.__cause__)
        for attempt in self._attempts.values():
            attempt.events.put_nowait(failure)

    def _write_ending(self, job: AssignedJob, failure: JobFailure) -> None:
        """Write why a run ended, beside the stream: it may be cancelled at any await, and the slot must be freed."""
        task = self._loop.create_task(self._fail(job, failure))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _fail(self, job: AssignedJob, failure: JobFailure) -> None:
        try:
            await _persist(lambda: self._store.fail(job.job_id, failure, epoch=job.epoch))
        except TransitionError:
            pass  # the router wrote the ending first
        except EaselError as error:
            logger.warning("job %s: its failure could not be written: %s", job.job_id, error)


async def _persist(write: Callable[[], Coroutine[Any, Any, Written]]) -> Written:
    """Repeat an idempotent write while Redis is away, within COMMIT_PATIENCE_S."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + COMMIT_PATIENCE_S
    while True:
        try:
            return await write()
        except Unavailable:
            if loop.time() + COMMIT_RETRY_S >= give_up_s:
                raise
            await asyncio.sleep(COMMIT_RETRY_S)


def _finished(reason: FinishReason, usage: Usage | None) -> pb.FinishedJob:
    took = None if usage is None else convert.usage_to_proto(usage)
    return pb.FinishedJob(finish_reason=reason.value, usage=took)


def _left_by_caller(context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunEvent]) -> JobFailure:
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s <= DEADLINE_SLACK_S:
        code = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        return JobFailure(code=code, reason="DEADLINE_EXCEEDED", message="the deadline passed")
    return _router_lost("the router's stream broke")


def _router_lost(message: str) -> JobFailure:
    return JobFailure(code=grpc.StatusCode.UNAVAILABLE.value[0], reason="ROUTER_LOST", message=message)
