"""One job in a router's charge: it waits for each slot, runs on the replica that Redis chose, and feeds its readers.

look at Redis ──> QUEUED ──> wait for a ring
    ^   ^    ├──> RUNNING under a new epoch ──> stream from that replica ──┐
    │   └────┼──< the stream ended: released, preempted, lost (reap) ──────┘
    │        ├──> RUNNING, but somebody runs it already ──> wait for a ring
    │        ├──> of another router ──> follow what Redis holds, to the end
    └ ring   └──> ended ──> hand out what is missing, then how it ended
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

import grpc

from cluster.core import FinishReason, JobSpec, Placement
from cluster.errors import (
    DeadlineExceeded,
    EaselError,
    JobCancelled,
    JobFailed,
    JobNotFound,
    TransitionError,
    Unavailable,
)
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.states import AttemptEnd
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.status import error_from_rpc, said_by_easel
from cluster.telemetry.logs import current_job
from cluster.telemetry.telemetry import Telemetry
from deployments.endings import ending_of, failure_of
from deployments.feed import Feed
from deployments.job_watch import AttemptSpan, JobWatch
from deployments.replicas import Replicas
from deployments.watch import stored_canvases, watch_stored

logger = logging.getLogger(__name__)

MISSED_RING_S = 2.0
REDIS_RETRY_S = 0.1
DEADLINE_SLACK_S = 0.05

RunCall = grpc.aio.UnaryStreamCall[pb.RunRequest, pb.RunEvent]


@dataclass(frozen=True, slots=True)
class Submission:
    """A job this router has charge of: its spec, and its deadline on this process's monotonic clock, if any.

    `waited_s` is how long the job was there before this router had charge of it.
    """

    spec: JobSpec
    deadline_s: float | None
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every charge of one router works with. `outage_patience_s` bounds how long readers wait for Redis."""

    store: JobStore
    replicas: Replicas
    doorbell: Doorbell
    router: str
    outage_patience_s: float
    telemetry: Telemetry = field(default_factory=Telemetry)


class Charge:
    """Supervises one job until it has ended; `feed` holds what its readers get.

    Invariant: an epoch is streamed at most once, so that no two runs of one assignment can meet.
    """

    def __init__(self, submission: Submission, around: Surroundings) -> None:
        self.feed = Feed()
        self._submission = submission
        self._job_id = submission.spec.job_id
        self._around = around
        self._store = around.store
        self._bell = asyncio.Event()
        self._tried_epoch = 0
        self._call: RunCall | None = None
        self._away_since_s: float | None = None
        self._watch = JobWatch(around.telemetry, submission.spec, submission.waited_s)

    @property
    def streams(self) -> bool:
        """True while a replica streams to this charge."""
        return self._call is not None

    def ring(self, kind: str) -> None:
        """The doorbell rang for this job: `kind` is a hint, Redis is looked at before anything is done."""
        if kind == "cancelled":
            self.feed.end(JobCancelled(f"job {self._job_id} was cancelled"))
        if kind.startswith("released:"):
            self.overtaken_by(int(kind.removeprefix("released:")) + 1)
        self._bell.set()

    def overtaken_by(self, epoch: int) -> None:
        """Redis says that the job is at `epoch`, or ended (as if by a later one): a stream under an older one ends."""
        if self._call is not None and epoch > self._tried_epoch:
            self._call.cancel()

    async def supervise(self, placement: Placement | None) -> None:
        """See the job to its end; `placement` when it is known to run already. Raises nothing but CancelledError."""
        current_job.set((self._job_id, None))
        try:
            while not self.feed.ended:
                try:
                    await self._turn(placement)
                except Unavailable as error:
                    await self._wait_for_redis(error)
                placement = None
        except DeadlineExceeded as error:
            await self._settle(error)
        except EaselError as error:
            self.feed.end(error)
        except Exception as error:
            logger.exception("job %s: its supervision failed", self._job_id)
            await self._settle(JobFailed(f"job {self._job_id}: internal error: {error!r}"))
        finally:
            self._watch.over(self.feed.outcome)

    async def _turn(self, placement: Placement | None) -> None:
        self._bell.clear()
        placement = placement or await self._store.placement(self._job_id)
        self._away_since_s = None
        if placement is None:
            await self._waits_or_ended()
        elif placement.router != self._around.router:
            await self._follow()
        elif placement.epoch > self._tried_epoch:
            await self._catch_up(placement.committed_canvases)
            await self._run(placement)
        else:
            await self._catch_up(placement.committed_canvases)
            await self._wait()

    async def _waits_or_ended(self) -> None:
        record = await self._store.get(self._job_id)
        await self._catch_up(record.canvases)
        if record.state.terminal:
            self.feed.end(ending_of(record))
        elif record.router != self._around.router:
            await self._follow()
        else:
            await self._wait()

    async def _catch_up(self, committed: int) -> None:
        """Hand out canvases that were committed while no stream brought them here."""
        if self.feed.next_canvas < committed:
            for canvas in await stored_canvases(self._store, self._job_id, self.feed.next_canvas):
                self.feed.publish(convert.committed_event(canvas))

    async def _follow(self) -> None:
        """Another router has charge of the job: hand out what Redis holds, to the end."""
        self._watch.follows()
        events = watch_stored(self._store, self._around.doorbell, self._job_id, self.feed.next_canvas)
        async with contextlib.aclosing(events):
            async for event in events:
                if event.HasField("finished"):
                    self.feed.end(event)
                else:
                    self.feed.publish(event)

    async def _run(self, placement: Placement) -> None:
        request = pb.RunRequest(
            spec=convert.job_spec_to_proto(self._submission.spec),
            epoch=placement.epoch,
            committed_canvases=placement.committed_canvases,
            drafts=self._submission.spec.wants_drafts,
        )
        timeout_s = None if self._submission.deadline_s is None else self._left_s()
        self._tried_epoch = placement.epoch
        with self._watch.attempt(placement) as attempt:
            await self._stream(request, timeout_s, placement, attempt)

    async def _stream(
        self, request: pb.RunRequest, timeout_s: float | None, placement: Placement, attempt: AttemptSpan
    ) -> None:
        run = self._around.replicas.stub(placement.address).Run
        call = self._call = run(request, timeout=timeout_s, metadata=attempt.metadata)
        try:
            async for event in call:
                self._publish(event, placement.replica)
        except grpc.aio.AioRpcError as error:
            attempt.error = error.details() or error.code().name
            await self._broken(placement, error)
        except asyncio.CancelledError:
            # Ending one's own call, or its channel, raises this as well; only a cancelled task goes on with it.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        finally:
            self._call = None

    def _publish(self, event: pb.RunEvent, replica: str) -> None:
        if event.HasField("draft"):
            self.feed.publish(convert.draft_event(convert.draft_from_proto(event.draft), replica))
        elif event.HasField("committed"):
            self.feed.publish(convert.committed_event(convert.canvas_from_proto(event.committed)))
        if event.HasField("finished"):
            self.feed.end(_finished(event.finished, replica))

    async def _broken(self, placement: Placement, error: grpc.aio.AioRpcError) -> None:
        """The stream ended early. What Easel said is in Redis already; what the transport says is a lost replica."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DeadlineExceeded(f"job {self._job_id}: its deadline passed while it ran")
        if said_by_easel(error):
            logger.info("job %s: %s", self._job_id, error_from_rpc(error))
            return
        # A call at its deadline can be cut by the other end's clock first, with another status.
        self._left_s(DEADLINE_SLACK_S)
        reason = error.details() or error.code().name
        logger.warning("job %s: replica %s was lost: %s", self._job_id, placement.replica, reason)
        while True:
            try:
                await self._store.reap(self._job_id, placement.epoch, AttemptEnd.REPLICA_LOST, reason)
            except (TransitionError, JobNotFound):
                return  # its replica released it, or it ended
            except Unavailable as away:
                await self._wait_for_redis(away)
            else:
                return

    async def _settle(self, error: EaselError) -> None:
        """Write a failure to Redis unless the job ended otherwise meanwhile, and end the feed as Redis has it."""
        outcome: v1.GenerateEvent | EaselError = error
        try:
            await self._store.fail(self._job_id, failure_of(error))
        except TransitionError:
            with contextlib.suppress(EaselError):
                outcome = ending_of(await self._store.get(self._job_id))
        except EaselError as lost:
            logger.warning("job %s: its failure could not be written: %s", self._job_id, lost)
        self.feed.end(outcome)

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(MISSED_RING_S, self._left_s())):
                await self._bell.wait()

    async def _wait_for_redis(self, error: Unavailable) -> None:
        """The job is in Redis, not here: a Redis that is away for a while loses it nothing.

        Readers hear of it after the patience; the router's heartbeat takes the job up again when Redis is back.
        """
        now_s = asyncio.get_running_loop().time()
        self._away_since_s = now_s if self._away_since_s is None else self._away_since_s
        if now_s - self._away_since_s > self._around.outage_patience_s:
            raise error
        self._left_s()
        await asyncio.sleep(REDIS_RETRY_S)

    def _left_s(self, slack_s: float = 0.0) -> float:
        if self._submission.deadline_s is None:
            return float("inf")
        left_s = self._submission.deadline_s - asyncio.get_running_loop().time()
        if left_s <= slack_s:
            raise DeadlineExceeded(f"job {self._job_id}: its deadline passed")
        return left_s


def _finished(job: pb.FinishedJob, replica: str) -> v1.GenerateEvent:
    reason, usage = FinishReason(job.finish_reason), convert.usage_from_proto(job.usage)
    return convert.finished_event(reason, usage, replica)
