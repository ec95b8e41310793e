"""Reading a job to its end through any router, each canvas once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import grpc

from cluster.errors import EaselError, JobNotFound, Unavailable
from cluster.routers import Routers, Tries
from cluster.rpc.easel.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from cluster.rpc.results import Accepted, Committed, Draft, Event, Finished, event_from_proto

CANCEL_S = 2.0

EventCall = grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.GenerateEvent]
WatchCall = grpc.aio.UnaryStreamCall[jobs_pb2.WatchJobRequest, generation_pb2.GenerateEvent]


class Reading:
    """One reader of one job.

    With a `request`, which carries the job's id, the reading starts the job, and stops it when it is left; without
    one it watches a job that is there and leaves it alone. A stream that breaks is taken up again by Jobs.Watch.

    Invariant: canvases come in order, none twice, from `from_canvas` on; `accepted` comes once.
    """

    def __init__(
        self,
        routers: Routers,
        job_id: str,
        *,
        from_canvas: int = 0,
        drafts: bool = False,
        request: generation_pb2.GenerateRequest | None = None,
    ) -> None:
        self._routers = routers
        self._job_id = job_id
        self._next_canvas = from_canvas
        self._drafts = drafts
        self._request = request
        self._accepted: Accepted | None = None
        self._is_stored = request is None
        self._is_anothers = request is None
        self._broken = False
        self._ended = False

    async def events(self, timeout_s: float | None = None) -> AsyncGenerator[Event, None]:
        """The job's events, within `timeout_s` in all. Raises the job's own error, or another EaselError."""
        tries = self._routers.tries(timeout_s)
        try:
            while True:
                failure: EaselError = Unavailable(f"job {self._job_id}: its stream ended before the job did")
                call = self._open(tries)
                try:
                    async for message in call:
                        tries.heard()
                        event = self._taken(event_from_proto(message), tries)
                        if event is not None:
                            yield event
                except grpc.aio.AioRpcError as error:
                    failure = self._routers.failure_of(error)
                finally:
                    call.cancel()
                if self._ended:
                    return
                await tries.again(self._judged(failure))
        except (asyncio.CancelledError, GeneratorExit):
            # The first call takes its job along when it is left. Nothing after it does: a watch never, and a
            # repeated call only where its router has charge of the job.
            if self._broken and not (self._ended or self._is_anothers):
                await stop_job(self._routers, self._job_id)
            raise

    def _open(self, tries: Tries) -> EventCall | WatchCall:
        channel = tries.channel()
        if self._request is None or self._is_stored:
            request = jobs_pb2.WatchJobRequest(job_id=self._job_id, from_canvas=self._next_canvas, drafts=self._drafts)
            jobs: jobs_pb2_grpc.JobsAsyncStub = jobs_pb2_grpc.JobsStub(channel)
            return jobs.Watch(request, timeout=tries.left_s, metadata=self._routers.metadata)
        stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
        return stub.StreamGenerate(self._request, timeout=tries.left_s, metadata=self._routers.metadata)

    def _taken(self, event: Event | None, tries: Tries) -> Event | None:
        """The event if it is new to the reader, else None."""
        if isinstance(event, Accepted):
            return self._first_accepted(event)
        if isinstance(event, Committed | Draft) and event.canvas_index < self._next_canvas:
            return None
        if isinstance(event, Committed):
            self._next_canvas = event.canvas_index + 1
            tries.progressed()
        self._ended = isinstance(event, Finished)
        return event

    def _first_accepted(self, event: Accepted) -> Accepted | None:
        self._is_stored = True
        if self._accepted is not None:
            return None
        self._accepted = event
        # Joined at the first try: the job was there before, and whoever made it may still want it.
        self._is_anothers = self._is_anothers or (event.joined and not self._broken)
        return event

    def _judged(self, failure: EaselError) -> EaselError:
        """How the reading goes on after a failure: a job that went with its router is started again."""
        lost = self._broken and isinstance(failure, JobNotFound)
        self._broken = True
        if not lost or self._request is None:
            return failure
        self._is_stored = False
        if self._accepted is not None:
            # With its seed the job writes the same canvases again, and what the reader has stays true.
            again = generation_pb2.GenerateRequest()
            again.CopyFrom(self._request)
            again.sampling.seed = self._accepted.seed
            self._request = again
        return Unavailable(str(failure))


async def stop_job(routers: Routers, job_id: str) -> None:
    """Cancel a job whose reader has left, as well as that goes within CANCEL_S: nobody waits for the outcome."""
    if not routers.is_open:
        return
    request = jobs_pb2.CancelJobRequest(job_id=job_id)

    def cancel(channel: grpc.aio.Channel) -> grpc.aio.UnaryUnaryCall[jobs_pb2.CancelJobRequest, jobs_pb2.Job]:
        jobs: jobs_pb2_grpc.JobsAsyncStub = jobs_pb2_grpc.JobsStub(channel)
        return jobs.Cancel(request, timeout=CANCEL_S, metadata=routers.metadata)

    with contextlib.suppress(EaselError, TimeoutError):
        async with asyncio.timeout(CANCEL_S):
            await routers.call(cancel, routers.tries())
