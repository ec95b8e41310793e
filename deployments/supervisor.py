"""A router's side of its jobs: waits for each job's slot, runs it on the replica Redis chose, and feeds its readers."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import grpc

from cluster.core import FinishReason, JobSpec, Placement
from cluster.errors import (
    DeadlineExceeded,
    EaselError,
    JobCancelled,
    JobFailed,
    StaleEpoch,
    TransitionError,
    Unavailable,
)
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.status import error_from_rpc, said_by_easel
from deployments.endings import ending_of, failure_of
from deployments.feed import Feed
from deployments.replicas import Replicas

logger = logging.getLogger(__name__)

MISSED_RING_S = 2.0
REDIS_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Submission:
    """A job this router accepted: its spec, and its deadline on this process's monotonic clock, if any."""

    spec: JobSpec
    deadline_s: float | None
    wants_drafts: bool


class Supervisor:
    """Owns one task per job that this router accepted and that has not ended.

    A job's ending is written to Redis by whoever sees it first: the replica (finish, engine failure), the caller
    (cancel), or this class (deadline, lost replica). Whatever Redis then says is what the readers get.
    """

    def __init__(self, store: JobStore, replicas: Replicas) -> None:
        self._store = store
        self._replicas = replicas
        self._feeds: dict[str, Feed] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._bells: dict[str, asyncio.Event] = {}

    def feed(self, job_id: str) -> Feed | None:
        """The feed of a job that runs under this router, or None."""
        return self._feeds.get(job_id)

    def begin(self, submission: Submission, placement: Placement | None) -> Feed:
        """Take charge of a job that was just stored; `placement` when it has its slot already."""
        job_id = submission.spec.job_id
        feed = self._feeds[job_id] = Feed()
        task = asyncio.create_task(self._supervise(submission, placement, feed), name=f"job {job_id}")
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._forget(job_id))
        return feed

    def ring(self, kind: str, job_id: str) -> None:
        """The doorbell rang for one of our jobs: look at its keys now."""
        bell = self._bells.get(job_id)
        if bell is not None:
            bell.set()
        elif kind == "cancelled" and job_id in self._feeds:
            self._feeds[job_id].end(JobCancelled(f"job {job_id} was cancelled"))

    async def cancel(self, job_id: str) -> None:
        """Stop a job whose caller left: Redis first, then our own stream to the replica."""
        record = await self._store.cancel(job_id)
        if record.state is not JobState.CANCELLED:
            return  # it ended by itself a moment earlier, and its own task says how
        feed = self._feeds.get(job_id)
        if feed is not None:
            feed.end(JobCancelled(f"job {job_id} was cancelled"))
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()

    async def look(self) -> None:
        """Place what can be placed, while any job here waits: a ring may be missed, and a deadline rings nowhere.

        Raises Unavailable.
        """
        if self._bells:
            await self._store.assign()

    async def drain(self, timeout_s: float) -> None:
        """Let jobs end, up to a bound; what is left fails with UNAVAILABLE: nobody would run or hear of it."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        left = [(job_id, task, self._feeds[job_id]) for job_id, task in self._tasks.items()]
        for _, task, _ in left:
            task.cancel()
        await asyncio.gather(*(task for _, task, _ in left), return_exceptions=True)
        await asyncio.gather(*(self._leave(job_id, feed) for job_id, _, feed in left))

    async def _leave(self, job_id: str, feed: Feed) -> None:
        error = Unavailable(f"the router of job {job_id} is shutting down", retry_after_ms=1000)
        feed.end(await self._settle(job_id, error))

    async def _supervise(self, submission: Submission, placement: Placement | None, feed: Feed) -> None:
        job_id = submission.spec.job_id
        try:
            placement = placement or await self._slot(submission)
            if placement is not None:
                await self._run(submission, placement, feed)
            if not feed.ended:
                feed.end(ending_of(await self._store.get(job_id)))
        except EaselError as error:
            feed.end(await self._settle(job_id, error))
        except Exception as error:
            logger.exception("job %s: its supervision failed", job_id)
            feed.end(await self._settle(job_id, JobFailed(f"job {job_id}: internal error: {error!r}")))

    async def _slot(self, submission: Submission) -> Placement | None:
        """Wait for an assignment; None when the job ended in the queue. A missed ring costs MISSED_RING_S."""
        job_id = submission.spec.job_id
        bell = self._bells[job_id] = asyncio.Event()
        loop = asyncio.get_running_loop()
        seen_s = loop.time()
        try:
            while True:
                # The first look comes before the first wait: the slot may have come between submit and here.
                try:
                    placement = await self._store.placement(job_id)
                    if placement is not None or (await self._store.get(job_id)).state.terminal:
                        return placement
                    seen_s = loop.time()
                except Unavailable:
                    # The job waits in Redis, not here: a Redis that is away for a while loses it nothing.
                    if loop.time() - seen_s > REDIS_PATIENCE_S:
                        raise
                await _wait(bell, min(MISSED_RING_S, _left_s(submission, job_id)))
                bell.clear()
        finally:
            self._bells.pop(job_id, None)

    async def _run(self, submission: Submission, placement: Placement, feed: Feed) -> None:
        job_id = submission.spec.job_id
        request = pb.RunRequest(
            spec=convert.job_spec_to_proto(submission.spec),
            epoch=placement.epoch,
            committed_canvases=placement.committed_canvases,
            drafts=submission.wants_drafts,
        )
        timeout_s = None if submission.deadline_s is None else _left_s(submission, job_id)
        stub = self._replicas.stub(placement.address)
        try:
            async for event in stub.Run(request, timeout=timeout_s):
                if event.HasField("draft"):
                    feed.publish(convert.draft_event(convert.draft_from_proto(event.draft), placement.replica))
                elif event.HasField("committed"):
                    feed.publish(convert.committed_event(convert.canvas_from_proto(event.committed)))
                if event.HasField("finished"):
                    feed.end(_finished(event.finished, placement.replica))
        except grpc.aio.AioRpcError as error:
            await self._broken(job_id, placement, error)

    async def _broken(self, job_id: str, placement: Placement, error: grpc.aio.AioRpcError) -> None:
        """The stream ended early. If the replica did not write why, this router does."""
        known = error_from_rpc(error)
        if isinstance(known, (JobCancelled, StaleEpoch, TransitionError)):
            return
        if isinstance(known, DeadlineExceeded):
            raise DeadlineExceeded(f"job {job_id}: its deadline passed while it ran")
        if not said_by_easel(error):
            await self._mark_lost(placement.replica)
        reason = error.details() or error.code().name
        raise Unavailable(f"job {job_id}: replica {placement.replica} was lost: {reason}", retry_after_ms=1000)

    async def _mark_lost(self, replica: str) -> None:
        """Take a replica that cannot be reached out of the slot table, before the slots of its failing jobs are free.

        It would else be the one with the fewest active canvases, and draw every waiting job until its lease ends. One
        that lives after all comes back with its next heartbeat.
        """
        logger.warning("replica %s cannot be reached: it leaves the slot table", replica)
        try:
            await self._store.remove_replica(replica)
        except EaselError as error:
            logger.warning("replica %s is left to its lease: %s", replica, error)

    async def _settle(self, job_id: str, error: EaselError) -> v1.GenerateEvent | EaselError:
        """Write a failure to Redis unless the job ended otherwise meanwhile, and say how it ended."""
        try:
            await self._store.fail(job_id, failure_of(error))
        except TransitionError:
            return ending_of(await self._store.get(job_id))
        except EaselError as lost:
            logger.warning("job %s: its failure could not be written: %s", job_id, lost)
        return error

    def _forget(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._feeds.pop(job_id, None)


def _finished(job: pb.FinishedJob, replica: str) -> v1.GenerateEvent:
    reason, usage = FinishReason(job.finish_reason), convert.usage_from_proto(job.usage)
    return convert.finished_event(reason, usage, replica)


def _left_s(submission: Submission, job_id: str) -> float:
    if submission.deadline_s is None:
        return float("inf")
    left_s = submission.deadline_s - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise DeadlineExceeded(f"job {job_id}: its deadline passed")
    return left_s


async def _wait(bell: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(bell.wait(), timeout_s)
    except TimeoutError:
        return
