"""One run of one job on a replica, from its start to its end there. It needs no reader: the stream only looks on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn, TypeVar

from cluster.core import Canvas, Draft, FinishReason, Image, JobSpec, ModelCard, Usage
from cluster.errors import EaselError, EngineError, JobReleased, StaleEpoch, TransitionError, Unavailable
from cluster.jobs.records import AssignedJob
from cluster.jobs.states import AttemptEnd
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.telemetry.logs import current_job
from cluster.telemetry.telemetry import Telemetry
from deployments.answer import Answer
from deployments.attempt_watch import AttemptWatch
from deployments.endings import failure_of
from deployments.engine.api import CanvasCheckpoint, Commit, EngineJob, Progress
from deployments.engine.pixels import decode
from deployments.load import Tally
from deployments.outbox import MAX_DRAFTS_BEHIND, Outbox
from deployments.step_loop import StepLoop
from deployments.watch import stored_canvases
from deployments.writing import Autosave, from_stored, persist, to_stored

Said = TypeVar("Said")


def attempt_key(job: AssignedJob) -> str:
    """The engine's id of an assignment: an epoch never comes twice, so a stop never meets a later attempt."""
    return f"{job.job_id}#{job.epoch}"


@dataclass(frozen=True, slots=True)
class Workshop:
    """What the runs of a replica share. Writes are repeated for `patience_s` while Redis is away."""

    steps: StepLoop
    store: JobStore
    card: ModelCard
    decode: Callable[[Sequence[int]], str]
    patience_s: float
    telemetry: Telemetry
    tally: Tally


@dataclass(frozen=True, slots=True)
class Release:
    """Why a run gives its job back; with `hand_over`, its router may be gone and another one is to take the job."""

    end: AttemptEnd
    message: str
    hand_over: bool = False


@dataclass(frozen=True, slots=True)
class _Released:
    """The engine has let go: nothing of it comes after this."""

    checkpoint: CanvasCheckpoint | None


@dataclass(frozen=True, slots=True)
class _Failed:
    """The job is to fail with this error."""

    error: EaselError


class Attempt:
    """A job under an epoch. A task of its own takes what the engine made in order, commits it, then tells it.

    The run ends in one of these ways, and `result` then raises what the router is to hear:
      - the answer is whole: Redis says finished;
      - `stop`: Redis has moved on already, nothing is written;
      - `release`: the canvases made so far are committed, then the job goes back to the queue, with its checkpoint;
      - `fail`: the job fails; also when the engine refuses the job itself, which it would do anywhere;
      - Redis refuses a canvas although the job is ours: it lost writes, and the job goes back to the queue;
      - Redis stays away for too long: Unavailable, and the job is left to the heartbeat or to the lease.
    Invariant: an event leaves through the outbox only after Redis holds its canvas under this epoch.
    """

    def __init__(self, shop: Workshop, spec: JobSpec, request: pb.RunRequest, traceparent: str = "") -> None:
        """`traceparent` names the router's span of this run."""
        self.assignment = AssignedJob(spec.job_id, request.epoch)
        self.key = attempt_key(self.assignment)
        self.outbox = Outbox()
        self._shop = shop
        self._spec = spec
        self._wants_drafts = request.drafts
        self._answer = Answer(
            shop.decode,
            max_new_tokens=spec.sampling.max_new_tokens,
            eos_token_ids=shop.card.eos_token_ids,
            stop=spec.stop,
        )
        self._autosave = Autosave(shop.store, spec.job_id, request.epoch)
        self._inbox: asyncio.Queue[Progress | Commit | _Released | _Failed | EaselError] = asyncio.Queue()
        self._release: Release | None = None
        self._watch = AttemptWatch(shop.telemetry, spec, request.epoch, traceparent)
        self.task = asyncio.create_task(self._run(request.committed_canvases), name=f"run {self.key}")
        self.task.add_done_callback(self._watch.over)

    def progressed(self, progress: Progress) -> None:
        """The engine made a denoising step."""
        self._watch.stepped(progress)
        if self._wants_drafts and self._inbox.qsize() < MAX_DRAFTS_BEHIND:
            self._inbox.put_nowait(progress)

    def committed(self, commit: Commit) -> None:
        """The engine finished a canvas."""
        self._inbox.put_nowait(commit)

    def checkpointed(self, checkpoint: CanvasCheckpoint) -> None:
        """The engine gave the canvas in progress, which may be saved."""
        self._autosave.offer(checkpoint)

    def stop(self, error: EaselError) -> None:
        """Redis has moved on: the engine stops at the next step, and the reader gets `error`."""
        self._shop.steps.stop(self.key)
        self._inbox.put_nowait(error)

    def fail(self, error: EaselError) -> None:
        """End the job with `error`: the engine stops at the next step, what it made before is committed."""
        self._shop.steps.stop(self.key)
        self._inbox.put_nowait(_Failed(error))

    def release(self, release: Release) -> None:
        """Give the job back at the next step, with its canvas in progress. The first reason stays."""
        if self.task.done():
            return
        if self._release is not None:
            # The router may go while a release is under way: without this nobody would look after the job for a lease.
            self._release = replace(self._release, hand_over=self._release.hand_over or release.hand_over)
            return
        self._release = release
        asyncio.wrap_future(self._shop.steps.release(self.key)).add_done_callback(self._let_go)

    async def result(self) -> None:
        """Wait for the end. Raises how it ended, unless the job finished; a caller that leaves changes nothing."""
        await asyncio.wait({self.task})
        if self.task.cancelled():
            raise Unavailable("the replica is shutting down", retry_after_ms=1000)
        self.task.result()

    def _let_go(self, done: asyncio.Future[CanvasCheckpoint | None]) -> None:
        # A broken engine lets go of nothing: the replica leaves with all its jobs, and tells every run by `stop`.
        if not done.cancelled() and done.exception() is None:
            self._inbox.put_nowait(_Released(done.result()))

    async def _run(self, committed_canvases: int) -> None:
        current_job.set((self._spec.job_id, self.assignment.epoch))
        try:
            committed = await self._stored(committed_canvases)
            if not await self._replayed(committed):
                await self._denoise(committed)
        finally:
            self._shop.steps.stop(self.key)
            self.outbox.end()
            await self._autosave.close()

    async def _stored(self, committed_canvases: int) -> list[Canvas]:
        if not committed_canvases:
            return []
        return await self._persist(lambda: stored_canvases(self._shop.store, self._spec.job_id))

    async def _replayed(self, committed: list[Canvas]) -> bool:
        """Feed earlier canvases to the answer. True when they are all of it: their run died before it said so."""
        job_id, epoch = self._spec.job_id, self.assignment.epoch
        for canvas in committed:
            finish = self._answer.add(canvas.raw_tokens).finish
            if finish is not None:
                usage = await self._persist(partial(self._shop.store.finish, job_id, epoch, finish))
                self.outbox.put(pb.RunEvent(finished=_finished(finish, usage)))
                return True
        return False

    async def _denoise(self, committed: list[Canvas]) -> None:
        checkpoint = await self._resumable(len(committed))
        try:
            images = await self._images()
        except ValueError as error:
            await self._end(self._refused(error))
        if self._release is None:
            self._start(committed, checkpoint, images)
        while True:
            # Bounded by the watchdog: an engine that is well reports, and of one that hangs we hear `stop`.
            item = await self._inbox.get()
            if isinstance(item, Progress):
                self.outbox.put(pb.RunEvent(draft=self._draft(item)))
            elif isinstance(item, Commit):
                if await self._commit(item):
                    return
            else:
                await self._end(item)

    async def _resumable(self, canvas_index: int) -> CanvasCheckpoint | None:
        """The canvas in progress that an earlier run left, if it is still the one in progress."""
        if self.assignment.epoch == 1:
            return None
        self._watch.continues(await self._persist(lambda: self._shop.store.get(self._spec.job_id)))
        kept = await self._persist(lambda: self._shop.store.checkpoint(self._spec.job_id))
        return from_stored(kept) if kept is not None and kept.canvas_index == canvas_index else None

    async def _images(self) -> tuple[Image, ...]:
        """What the prompt's image tokens stand for, decoded. Redis forgets it when the job ends.

        Raises ValueError for a file that does not decode.
        """
        if not self._spec.image_count:
            return ()
        kept = await self._persist(lambda: self._shop.store.images(self._spec.job_id))
        if kept is None:
            raise TransitionError(f"job {self._spec.job_id} has no images in Redis any more: it has ended")
        # Away from the step thread, which other jobs share.
        return await asyncio.to_thread(decode, convert.images_from_bytes(kept))

    def _start(self, committed: list[Canvas], checkpoint: CanvasCheckpoint | None, images: tuple[Image, ...]) -> None:
        job = EngineJob(
            job_id=self.key,
            prompt_tokens=self._spec.prompt_tokens,
            sampling=self._spec.sampling,
            committed=tuple(canvas.raw_tokens for canvas in committed),
            checkpoint=checkpoint,
            wants_drafts=self._wants_drafts,
            images=images,
        )
        asyncio.wrap_future(self._shop.steps.start(job)).add_done_callback(self._started)

    def _started(self, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None and not isinstance(error, EngineError):
            self._inbox.put_nowait(self._refused(error))

    def _refused(self, error: BaseException) -> _Failed:
        return _Failed(EngineError(f"the engine refused job {self._spec.job_id}: {error}"))

    async def _commit(self, commit: Commit) -> bool:
        """Write a canvas, then tell it; True when the answer is whole."""
        piece = self._answer.add(commit.tokens)
        canvas = Canvas(
            index=commit.canvas_index,
            raw_tokens=commit.tokens,
            tokens=piece.tokens,
            text=piece.text,
            denoising_steps=commit.denoising_steps,
            mean_entropy=commit.mean_entropy,
        )
        if commit.last and piece.finish is None:
            short = f"the engine ended job {self._spec.job_id} before its answer was whole"
            await self._end(_Failed(EngineError(short)))
        message = convert.canvas_to_proto(canvas)
        usage = await self._write(canvas, message.SerializeToString(), piece.finish)
        if usage is not None:
            self._shop.tally.ended(usage.canvases)
        self._watch.committed(canvas)
        event = pb.RunEvent(committed=message)
        if piece.finish is not None:
            event.finished.CopyFrom(_finished(piece.finish, usage))
        self.outbox.put(event)
        return piece.finish is not None

    async def _write(self, canvas: Canvas, data: bytes, finish: FinishReason | None) -> Usage | None:
        def commit() -> Awaitable[Usage | None]:
            return self._shop.store.commit(
                self._spec.job_id,
                self.assignment.epoch,
                canvas.index,
                data,
                tokens=len(canvas.tokens),
                denoising_steps=canvas.denoising_steps,
                finish=finish,
            )

        try:
            return await self._persist(commit)
        except StaleEpoch:
            raise
        except TransitionError as refused:
            self._release = Release(AttemptEnd.LOST_WRITES, str(refused))
            await self._give_back(None)

    async def _end(self, item: _Released | _Failed | EaselError) -> NoReturn:
        if isinstance(item, EaselError):
            raise item
        if isinstance(item, _Failed):
            job_id, failure = self._spec.job_id, failure_of(item.error)
            await self._persist(lambda: self._shop.store.fail(job_id, failure, epoch=self.assignment.epoch))
            raise item.error
        await self._give_back(item.checkpoint)

    async def _give_back(self, checkpoint: CanvasCheckpoint | None) -> NoReturn:
        kept = None if checkpoint is None else to_stored(checkpoint)

        def release() -> Awaitable[None]:
            why = self._release  # read at every try: `hand_over` may have come meanwhile
            assert why is not None  # it is set before anything asks for this
            return self._shop.store.release(
                *(self._spec.job_id, self.assignment.epoch, why.end, why.message),
                checkpoint=kept,
                hand_over=why.hand_over,
            )

        await self._persist(release)
        raise JobReleased(f"job {self._spec.job_id} was given back by its replica")

    async def _persist(self, call: Callable[[], Awaitable[Said]]) -> Said:
        return await persist(call, self._shop.patience_s)

    def _draft(self, progress: Progress) -> pb.DraftCanvas:
        ends = self._shop.card.eos_token_ids
        tokens = list(progress.draft_tokens)
        end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        return convert.draft_to_proto(
            Draft(
                canvas_index=progress.canvas_index,
                step=progress.step,
                text=self._shop.decode(tokens[:end]),
                mean_entropy=progress.mean_entropy,
                accepted_tokens=progress.accepted_tokens,
            )
        )


def _finished(reason: FinishReason, usage: Usage | None) -> pb.FinishedJob:
    took = None if usage is None else convert.usage_to_proto(usage)
    return pb.FinishedJob(finish_reason=reason.value, usage=took)
