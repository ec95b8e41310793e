"""The Python client: what a backend service imports to use an Easel cluster.

    async with EaselClient("localhost:8500") as client:
        answer = await client.generate("count 31 to 34", seed=7)
        print(answer.text)

Errors are those of cluster.errors. A call that could not reach the cluster is repeated a few times before
anything of its answer was seen; requests carry an id, so that a repeated one joins its job instead of
starting another.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import EaselError, Unavailable
from cluster.rpc import convert
from cluster.rpc.easel.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from cluster.rpc.options import channel_options
from cluster.rpc.prompts import Prompt, RequestOptions, build_request
from cluster.rpc.results import (
    Accepted,
    Answer,
    ClusterView,
    Committed,
    Draft,
    Event,
    Finished,
    JobView,
    answer_from_proto,
    cluster_from_proto,
    event_from_proto,
    job_from_proto,
)
from cluster.rpc.status import error_from_rpc

__all__ = [
    "Accepted",
    "Answer",
    "ClusterView",
    "Committed",
    "Draft",
    "EaselClient",
    "Event",
    "Finished",
    "JobView",
    "RequestOptions",
]

PAGE_SIZE = 200
HEALTH_CHECK_S = 2.0
READY_LOOK_S = 0.1
# The router ends a job at its timeout and says so; the call waits this much longer to hear it.
DEADLINE_SLACK_S = 1.0
MAX_CALL_S = 24 * 3600.0
# How grpc begins when it found no server, against "Connection reset by peer" and the like from one that went away.
_NOBODY_THERE = ("failed to connect", "DNS resolution failed", "errors resolving")

Sent = TypeVar("Sent")
Received = TypeVar("Received")
EventCall = grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.GenerateEvent]
WatchCall = grpc.aio.UnaryStreamCall[jobs_pb2.WatchJobRequest, generation_pb2.GenerateEvent]
OpenStream = Callable[[int], EventCall | WatchCall]


class EaselClient:
    """One connection to a cluster, for use in one event loop by any number of tasks.

    `timeout_s` bounds every job that does not name its own; `rpc_timeout_s` bounds the calls that do not wait
    for a job. `retries` is how often a call that found the cluster unavailable is repeated. Close it, or use
    it as an async context manager.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float | None = None,
        rpc_timeout_s: float = 10.0,
        retries: int = 3,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._rpc_timeout_s = rpc_timeout_s
        self._retries = retries
        self._credentials = credentials
        self._open_channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it. The next call would open it again."""
        channel, self._open_channel = self._open_channel, None
        if channel is not None:
            await channel.close()

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the cluster can run a job. Raises Unavailable when `timeout_s` is not enough."""
        last = "it has no replica yet"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        if await self._is_serving():
                            return
                    except EaselError as error:
                        last = str(error)
                    await asyncio.sleep(READY_LOOK_S)
        except TimeoutError:
            what = f"the cluster at {self._target} is not ready after {timeout_s:g} s: {last}"
            raise Unavailable(what) from None

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        tokens: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Answer:
        """The whole answer to a prompt: a text, messages as (role, content) or dicts, or `tokens`.

        Cancelling the awaiting task stops the job. Raises an EaselError.
        """
        request = self._request(prompt, tokens, options, drafts=False)
        stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(self._channel)
        return answer_from_proto(await self._unary(stub.Generate, request, _call_timeout_s(request)))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        tokens: Sequence[int] | None = None,
        drafts: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Event, None]:
        """The answer's events as they happen. Closing the iterator stops the job. Raises an EaselError."""
        request = self._request(prompt, tokens, options, drafts=drafts)
        stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(self._channel)
        return self._events(lambda _: stub.StreamGenerate(request, timeout=_call_timeout_s(request)))

    async def submit(
        self,
        prompt: Prompt | None = None,
        *,
        tokens: Sequence[int] | None = None,
        drafts: bool = False,
        **options: Unpack[RequestOptions],
    ) -> JobView:
        """Store a job and return at once; read it later with `get` or `watch`. Raises an EaselError.

        With `drafts` its replica makes drafts, for a `watch` that asks for them.
        """
        request = jobs_pb2.SubmitRequest(request=self._request(prompt, tokens, options, drafts=drafts))
        return job_from_proto(await self._unary(self._jobs.Submit, request, self._rpc_timeout_s))

    async def get(self, job_id: str) -> JobView:
        """A job as it stands. Raises JobNotFound, or another EaselError."""
        request = jobs_pb2.GetJobRequest(job_id=job_id)
        return job_from_proto(await self._unary(self._jobs.Get, request, self._rpc_timeout_s))

    async def cancel(self, job_id: str) -> JobView:
        """Stop a job at its next denoising step; one that has ended stays as it is. Raises an EaselError."""
        request = jobs_pb2.CancelJobRequest(job_id=job_id)
        return job_from_proto(await self._unary(self._jobs.Cancel, request, self._rpc_timeout_s))

    def watch(self, job_id: str, from_canvas: int = 0, *, drafts: bool = False) -> AsyncGenerator[Event, None]:
        """A job's events from a canvas on, those already committed first; closing it leaves the job alone.

        A connection that breaks is taken up again after the last canvas seen, so every canvas comes once.
        Raises the job's own error when it failed or was cancelled, or another EaselError.
        """
        jobs = self._jobs

        def open_stream(next_canvas: int) -> WatchCall:
            request = jobs_pb2.WatchJobRequest(job_id=job_id, from_canvas=next_canvas, drafts=drafts)
            return jobs.Watch(request)

        return self._events(open_stream, from_canvas=from_canvas, resumable=True)

    async def jobs(self, state: str | None = None) -> AsyncGenerator[JobView, None]:
        """All jobs, newest first, without their texts; of one state ("queued", "running", ...) if given."""
        wanted = convert.job_state_to_proto(state) if state else jobs_pb2.JOB_STATE_UNSPECIFIED
        page_token = ""
        while True:
            request = jobs_pb2.ListJobsRequest(page_size=PAGE_SIZE, page_token=page_token, state=wanted)
            page = await self._unary(self._jobs.List, request, self._rpc_timeout_s)
            for job in page.jobs:
                yield job_from_proto(job)
            page_token = page.next_page_token
            if not page_token:
                return

    async def status(self) -> ClusterView:
        """Replicas, slots and the queue. Raises an EaselError."""
        stub: cluster_pb2_grpc.ClusterAsyncStub = cluster_pb2_grpc.ClusterStub(self._channel)
        request = cluster_pb2.GetStatusRequest()
        return cluster_from_proto(await self._unary(stub.GetStatus, request, self._rpc_timeout_s))

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Made on first use: a channel belongs to the event loop that runs then.
        if self._open_channel is None:
            options = channel_options()
            if self._credentials is None:
                self._open_channel = grpc.aio.insecure_channel(self._target, options)
            else:
                self._open_channel = grpc.aio.secure_channel(self._target, self._credentials, options)
        return self._open_channel

    @property
    def _jobs(self) -> jobs_pb2_grpc.JobsAsyncStub:
        return jobs_pb2_grpc.JobsStub(self._channel)

    def _request(
        self, prompt: Prompt | None, tokens: Sequence[int] | None, options: RequestOptions, *, drafts: bool
    ) -> generation_pb2.GenerateRequest:
        bounded: RequestOptions = {"timeout_s": self._timeout_s, **options}
        return build_request(prompt, tokens, bounded, drafts=drafts)

    async def _is_serving(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its type stubs leave the methods out
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_CHECK_S)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def _unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Sent, Received],
        request: Sent,
        timeout_s: float | None,
    ) -> Received:
        attempt = 0
        while True:
            try:
                return await method(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                failure = self._failure(error)
                if not self._may_retry(failure, attempt):
                    raise failure from error
            await asyncio.sleep(backoff_s(attempt, failure.retry_after_ms, random.random()))
            attempt += 1

    async def _events(
        self, open_stream: OpenStream, *, from_canvas: int = 0, resumable: bool = False
    ) -> AsyncGenerator[Event, None]:
        next_canvas, attempt, opened = from_canvas, 0, False
        while True:
            call = open_stream(next_canvas)
            try:
                async for message in call:
                    event = event_from_proto(message)
                    if event is None or (opened and isinstance(event, Accepted)):
                        continue
                    opened = True
                    if isinstance(event, Committed):
                        next_canvas, attempt = event.canvas_index + 1, 0
                    yield event
            except grpc.aio.AioRpcError as error:
                failure = self._failure(error)
                if (opened and not resumable) or not self._may_retry(failure, attempt):
                    raise failure from error
            else:
                return
            finally:
                call.cancel()
            await asyncio.sleep(backoff_s(attempt, failure.retry_after_ms, random.random()))
            attempt += 1

    def _may_retry(self, failure: EaselError, attempt: int) -> bool:
        return isinstance(failure, Unavailable) and attempt < self._retries

    def _failure(self, error: grpc.aio.AioRpcError) -> EaselError:
        failure = error_from_rpc(error)
        cause = str(failure)
        if isinstance(failure, Unavailable) and cause.startswith(_NOBODY_THERE):
            return Unavailable(f"no cluster answers at {self._target}")
        return failure


def backoff_s(attempt: int, retry_after_ms: int | None, uniform: float) -> float:
    """Pause before retry number `attempt` (from 0): what the server asked for, else 0.1 s doubled each time.

    `uniform` in [0, 1) spreads the pause over its upper half, so that clients do not come back together.
    """
    full_s = min(0.1 * 2**attempt, 5.0) if retry_after_ms is None else retry_after_ms / 1000
    return full_s * (0.5 + 0.5 * uniform) if retry_after_ms is None else full_s * (1 + 0.25 * uniform)


def _call_timeout_s(request: generation_pb2.GenerateRequest) -> float | None:
    if not request.HasField("timeout"):
        return None
    # Out of range the router says so; grpc's own clock must not overflow before that.
    return min(max(request.timeout.seconds + request.timeout.nanos / 1e9, 0), MAX_CALL_S) + DEADLINE_SLACK_S
