"""The Python client: what a backend service imports to use an Easel cluster.

    async with EaselClient("localhost:8500") as client:
        answer = await client.generate("count 31 to 34", seed=7)
        print(answer.text)

Errors are those of cluster.errors. A call that could not reach the cluster is repeated; requests carry an id, so
that a repeated one joins its job instead of starting another. A stream that loses its router goes on through any
other, after the last canvas that was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core import Violation
from cluster.errors import EaselError, InvalidRequest, Unavailable
from cluster.reading import Reading, stop_job
from cluster.routers import Routers
from cluster.rpc import convert
from cluster.rpc.easel.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from cluster.rpc.prompts import Prompt, RequestOptions, build_request
from cluster.rpc.results import (
    Accepted,
    Answer,
    ClusterView,
    Committed,
    Draft,
    Event,
    Finished,
    JobAttempt,
    JobView,
    answer_from_proto,
    cluster_from_proto,
    job_from_proto,
)
from cluster.rpc.sampling import shown
from cluster.trust import ClientTls, Trust

__all__ = [
    "Accepted",
    "Answer",
    "ClientTls",
    "ClusterView",
    "Committed",
    "Draft",
    "EaselClient",
    "Event",
    "Finished",
    "JobAttempt",
    "JobView",
    "RequestOptions",
]

PAGE_SIZE = 200
HEALTH_CHECK_S = 2.0
READY_LOOK_S = 0.1
# The router ends a job at its timeout and says so; the call waits this much longer to hear it.
DEADLINE_SLACK_S = 1.0
MAX_CALL_S = 24 * 3600.0
MAX_OFFSET = 2**31 - 1

Sent = TypeVar("Sent")
Received = TypeVar("Received")
Method = Callable[[grpc.aio.Channel], "grpc.aio.UnaryUnaryMultiCallable[Sent, Received]"]
GenerateCall = grpc.aio.UnaryUnaryCall[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]


class EaselClient:
    """A connection to a cluster, for use in one event loop by any number of tasks.

    `target` is host:port, or several with commas between: one router is asked, and the next one when it cannot be
    reached. `timeout_s` bounds every job that does not name its own; `rpc_timeout_s` bounds each try of the calls
    that do not wait for a job.

    A call that finds the cluster unavailable is repeated: at a cluster that never answered this client `retries`
    times; else for at least `patience_s` too, in which a router that was lost is replaced. Close the client, or use
    it as an async context manager. Raises ConfigError for an empty target or a limit below 0.

    `tls` is for routers behind TLS, `credentials` for what it cannot say. `api_key` is the key or token that every call
    brings along; a function is asked at each call, for tokens that expire.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float | None = None,
        rpc_timeout_s: float = 10.0,
        retries: int = 3,
        patience_s: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        tls: ClientTls | None = None,
        api_key: str | Callable[[], str] | None = None,
    ) -> None:
        trust = Trust(tls, api_key, credentials)
        self._timeout_s = timeout_s
        self._rpc_timeout_s = rpc_timeout_s
        self._routers = Routers(target, retries=retries, patience_s=patience_s, trust=trust)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it. The next call would open it again."""
        await self._routers.close()

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
            what = f"the cluster at {self._routers.target} is not ready after {timeout_s:g} s: {last}"
            raise Unavailable(what) from None

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        tokens: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Answer:
        """The whole answer to a prompt: a text, messages as (role, content) or dicts, or `tokens`.

        Content is a text, or a list of texts, images as bytes, and paths of images: [Path("cat.png"), "What is it?"].

        When its router is lost the call is repeated, and joins its job at another one. Cancelling the awaiting task
        stops the job. Raises an EaselError.
        """
        request = self._request(prompt, tokens, options, drafts=False)
        tries = self._routers.tries(_call_timeout_s(request))

        def call(channel: grpc.aio.Channel) -> GenerateCall:
            stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
            return stub.Generate(request, timeout=tries.left_s, metadata=self._routers.metadata)

        try:
            return answer_from_proto(await self._routers.call(call, tries))
        except asyncio.CancelledError:
            if tries.repeated:  # leaving a call that joined its job need not stop it
                await stop_job(self._routers, request.request_id)
            raise

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        tokens: Sequence[int] | None = None,
        drafts: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Event, None]:
        """The answer's events as they happen, each canvas once, whatever becomes of the routers meanwhile.

        Closing the iterator stops the job. Raises an EaselError.
        """
        request = self._request(prompt, tokens, options, drafts=drafts)
        reading = Reading(self._routers, request.request_id, drafts=drafts, request=request)
        return reading.events(_call_timeout_s(request))

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
        return job_from_proto(await self._unary(lambda channel: _jobs(channel).Submit, request))

    async def get(self, job_id: str) -> JobView:
        """A job as it stands. Raises JobNotFound, or another EaselError."""
        request = jobs_pb2.GetJobRequest(job_id=_sendable("job_id", job_id))
        return job_from_proto(await self._unary(lambda channel: _jobs(channel).Get, request))

    async def cancel(self, job_id: str) -> JobView:
        """Stop a job at its next denoising step. Safe to repeat.

        Raises TransitionError for a job that has succeeded or failed already, or another EaselError.
        """
        request = jobs_pb2.CancelJobRequest(job_id=_sendable("job_id", job_id))
        return job_from_proto(await self._unary(lambda channel: _jobs(channel).Cancel, request))

    def watch(self, job_id: str, from_canvas: int = 0, *, drafts: bool = False) -> AsyncGenerator[Event, None]:
        """A job's events from a canvas on, those already committed first; closing it leaves the job alone.

        A connection that breaks is taken up again after the last canvas seen, so every canvas comes once.
        Raises InvalidRequest for an offset beyond the job's end, the job's own error when it failed or was
        cancelled, or another EaselError.
        """
        if not 0 <= from_canvas <= MAX_OFFSET:
            raise InvalidRequest([Violation("from_canvas", f"is {from_canvas}; allowed is 0 to {MAX_OFFSET}")])
        job_id = _sendable("job_id", job_id)
        return Reading(self._routers, job_id, from_canvas=from_canvas, drafts=drafts).events()

    async def jobs(self, state: str | None = None) -> AsyncGenerator[JobView, None]:
        """All jobs, newest first, without their texts; of one state ("queued", "running", ...) if given."""
        wanted = convert.job_state_to_proto(state) if state else jobs_pb2.JOB_STATE_UNSPECIFIED
        page_token = ""
        while True:
            request = jobs_pb2.ListJobsRequest(page_size=PAGE_SIZE, page_token=page_token, state=wanted)
            page = await self._unary(lambda channel: _jobs(channel).List, request)
            for job in page.jobs:
                yield job_from_proto(job)
            page_token = page.next_page_token
            if not page_token:
                return

    async def status(self) -> ClusterView:
        """Replicas, slots and the queue. Raises an EaselError."""
        request = cluster_pb2.GetStatusRequest()
        return cluster_from_proto(await self._unary(lambda channel: _cluster(channel).GetStatus, request))

    async def drain(self, replica: str) -> int:
        """Have a replica give back its jobs and leave; returns how many it runs. They go on elsewhere.

        Returns at once: the replica has left when `status` shows it no more. Raises ReplicaNotFound, InvalidRequest for
        what no replica can be called, or another EaselError.
        """
        request = cluster_pb2.DrainReplicaRequest(replica=_sendable("replica", replica))
        return (await self._unary(lambda channel: _cluster(channel).DrainReplica, request)).running_jobs

    def _request(
        self, prompt: Prompt | None, tokens: Sequence[int] | None, options: RequestOptions, *, drafts: bool
    ) -> generation_pb2.GenerateRequest:
        bounded: RequestOptions = {"timeout_s": self._timeout_s, **options}
        return build_request(prompt, tokens, bounded, drafts=drafts)

    async def _is_serving(self) -> bool:
        asked = self._routers.current
        stub: Any = health_pb2_grpc.HealthStub(self._routers.channel(asked))  # its type stubs leave the methods out
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_CHECK_S)
        except grpc.aio.AioRpcError as error:
            self._routers.leave(asked)
            raise self._routers.failure_of(error) from error
        self._routers.served = True
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def _unary(self, method: Method[Sent, Received], request: Sent) -> Received:
        tries, timeout_s = self._routers.tries(), self._rpc_timeout_s

        def call(channel: grpc.aio.Channel) -> grpc.aio.UnaryUnaryCall[Sent, Received]:
            return method(channel)(request, timeout=timeout_s, metadata=self._routers.metadata)

        return await self._routers.call(call, tries)


def _jobs(channel: grpc.aio.Channel) -> jobs_pb2_grpc.JobsAsyncStub:
    return jobs_pb2_grpc.JobsStub(channel)


def _cluster(channel: grpc.aio.Channel) -> cluster_pb2_grpc.ClusterAsyncStub:
    return cluster_pb2_grpc.ClusterStub(channel)


def _sendable(field: str, value: str) -> str:
    """`value` as it is. Raises InvalidRequest for text that no message can carry."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest([Violation(field, f"is {shown(value)}; text must be valid Unicode")]) from None
    return value


def _call_timeout_s(request: generation_pb2.GenerateRequest) -> float | None:
    if not request.HasField("timeout"):
        return None
    # Out of range the router says so; grpc's own clock must not overflow before that.
    return min(max(request.timeout.seconds + request.timeout.nanos / 1e9, 0), MAX_CALL_S) + DEADLINE_SLACK_S
