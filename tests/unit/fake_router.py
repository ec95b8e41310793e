"""A small router for tests of the client and the command: real grpc.aio, real checks, answers by reversing text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import grpc
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from cluster.core import Canvas, Draft, FinishReason, Image, ModelCard, ReplicaRow, SamplingParams, Turn, Usage
from cluster.errors import (
    EaselError,
    JobCancelled,
    JobNotFound,
    ReplicaNotFound,
    TransitionError,
    Unavailable,
)
from cluster.jobs.keys import checked_id
from cluster.rpc import convert
from cluster.rpc.easel.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from cluster.rpc.interceptors import EdgeInterceptor
from cluster.rpc.options import server_options
from cluster.rpc.requests import (
    ParsedRequest,
    check_from_canvas,
    check_job_id,
    check_within_job,
    parse_generate,
    parse_list,
    under,
)

CARD = ModelCard(
    name="characters",
    version="v1",
    vocab_size=128,
    canvas_tokens=8,
    max_context_tokens=256,
    bos_token_id=2,
    pad_token_id=0,
    eos_token_ids=(1,),
    defaults=SamplingParams(0, 32, 48, 0.1, 0.4, 0.8, 0.005, 1),
)
IMAGE_TOKEN = 3
MAX_REQUEST_BYTES = 64 * 1024
USAGE = Usage(5, 6, 2, 7, 1, 0, 3, 40)
PATIENCE_S = 20.0
Context = grpc.aio.ServicerContext[Any, Any]


class Characters:
    """One token a character and IMAGE_TOKEN an image; refuses two turns of the same role, like a strict template."""

    def encode_messages(self, messages: Sequence[Turn]) -> list[int]:
        roles = [role for role, _ in messages]
        if any(first == second for first, second in pairwise(roles)):
            raise ValueError("roles must alternate")
        pieces = [piece for _, content in messages for piece in ([content] if isinstance(content, str) else content)]
        spelt = ([IMAGE_TOKEN] if isinstance(piece, Image) else map(ord, piece) for piece in pieces)
        return [2, *(min(token, 127) for tokens in spelt for token in tokens)]


class FakeRouter(generation_pb2_grpc.GenerationServicer, jobs_pb2_grpc.JobsServicer, cluster_pb2_grpc.ClusterServicer):
    """Reverses a text, in two canvases. Prompts that start with "!" choose a misbehaviour.

    With a `peer` it is another router of the peer's cluster: both know the same jobs.
    """

    def __init__(self, peer: FakeRouter | None = None) -> None:
        self.parsed: dict[str, ParsedRequest] = {} if peer is None else peer.parsed
        self.prompts: dict[str, str] = {} if peer is None else peer.prompts
        self.bounds = (0, 0)
        self.replicas = [ReplicaRow("r0", "127.0.0.1:1", CARD.name, "v1", 8, 3, 4000, {"denoising_steps": 12.0})]
        self.history: list[jobs_pb2.JobAttempt] = []
        self.ended: set[str] = set()
        self.cancelled: list[str] = []
        self.calls: list[str] = []
        self.seeds = iter(range(9, 100))
        self.unavailable_calls = 0
        self.retry_after_ms = 1
        self.accepted_and_broken = 0
        # After these canvases a stream breaks, once each, or holds until it is left.
        self.breaks_after: list[int] = []
        self.holds_after: int | None = None
        self.holds_unary = False
        self.breaks_with: EaselError = Unavailable("the router goes away", retry_after_ms=1)
        self.forgets = False
        self.drains = True
        self.hanging = asyncio.Event()
        self.left = asyncio.Event()

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        parsed = await self._begin("Generate", request, request.text)
        response = generation_pb2.GenerateResponse(
            job_id=parsed.job_id, model=CARD.name, replica="r0", seed=parsed.spec.sampling.seed
        )
        await self._misbehave(request.text)
        if self.holds_unary:
            await self._hang()
        for canvas in canvases(request.text):
            response.text += canvas.text
            response.token_ids.extend(canvas.tokens)
        response.finish_reason = convert.finish_reason_to_proto(FinishReason.EOS)
        response.usage.CopyFrom(convert.usage_to_proto(USAGE))
        return response

    async def StreamGenerate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateEvent]:
        joined = request.request_id in self.parsed
        parsed = await self._begin("StreamGenerate", request, request.text)
        sampling = parsed.spec.sampling
        yield convert.accepted_event(parsed.job_id, 5, CARD.name, sampling.seed, joined=joined)
        async for event in self._told(parsed.job_id, 0, drafts=request.drafts):
            yield event

    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Context) -> jobs_pb2.Job:  # noqa: N802
        with under("request"):
            parsed = await self._begin("Submit", request.request, request.request.text)
        return self._job(parsed.job_id)

    async def Get(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.Job:  # noqa: N802
        job = self._job(check_job_id(request.job_id))
        job.text = self.prompts[request.job_id][::-1]
        return job

    async def Watch(  # noqa: N802
        self, request: jobs_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateEvent]:
        self.calls.append(f"Watch {request.from_canvas}")
        start = check_from_canvas(request.from_canvas)
        job = self._job(check_job_id(request.job_id))
        check_within_job(start, 2, ended=True)
        yield convert.accepted_event(request.job_id, 5, CARD.name, job.seed, joined=True)
        async for event in self._told(request.job_id, start, drafts=request.drafts):
            yield event

    async def Cancel(self, request: jobs_pb2.CancelJobRequest, context: Context) -> jobs_pb2.Job:  # noqa: N802
        job = self._job(check_job_id(request.job_id))
        if request.job_id in self.ended:
            raise TransitionError(f"job {request.job_id} cannot be cancelled: it has succeeded already")
        self.cancelled.append(request.job_id)
        job.state = jobs_pb2.JOB_STATE_CANCELLED
        return job

    async def List(  # noqa: N802
        self, request: jobs_pb2.ListJobsRequest, context: Context
    ) -> jobs_pb2.ListJobsResponse:
        parse_list(request)
        ids = sorted(self.parsed)
        start = int(request.page_token or 0)
        page = ids[start : start + 2]
        more = str(start + 2) if start + 2 < len(ids) else ""
        return jobs_pb2.ListJobsResponse(jobs=[self._job(job_id) for job_id in page], next_page_token=more)

    async def GetStatus(  # noqa: N802
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.ClusterStatus:
        shown = [convert.replica_to_proto(row) for row in self.replicas]
        if self.drains:
            # Whoever asks sees a draining replica with one job less each time, and then no more.
            self.replicas = [row for row in self.replicas if row.active or not row.draining]
            self.replicas = [replace(row, active=row.active - 1) if row.draining else row for row in self.replicas]
        return cluster_pb2.ClusterStatus(
            replicas=shown,
            slots=8,
            active=3,
            queued=1,
            queue_limit=1000,
            routers=["router-0"],
            version="0.1.0",
            pending=["1 replica waits for {GPU: 1}"],
            min_replicas=self.bounds[0],
            max_replicas=self.bounds[1],
        )

    async def DrainReplica(  # noqa: N802
        self, request: cluster_pb2.DrainReplicaRequest, context: Context
    ) -> cluster_pb2.DrainReplicaResponse:
        name = checked_id("replica", request.replica)
        found = next((row for row in self.replicas if row.replica == name), None)
        if found is None:
            raise ReplicaNotFound(f"no replica {name}: it has left, or it never was")
        self.replicas[self.replicas.index(found)] = replace(found, draining=True)
        return cluster_pb2.DrainReplicaResponse(running_jobs=found.active)

    async def _begin(self, call: str, request: generation_pb2.GenerateRequest, prompt: str) -> ParsedRequest:
        self.calls.append(call)
        if self.unavailable_calls:
            self.unavailable_calls -= 1
            raise Unavailable("the router starts", retry_after_ms=self.retry_after_ms)
        parsed = parse_generate(
            request, CARD, Characters(), deadline_ms=None, new_id=lambda: "made", new_seed=lambda: next(self.seeds)
        )
        self.parsed[parsed.job_id] = parsed
        self.prompts[parsed.job_id] = prompt
        return parsed

    async def _told(self, job_id: str, start: int, *, drafts: bool) -> AsyncIterator[generation_pb2.GenerateEvent]:
        if self.accepted_and_broken:
            self.accepted_and_broken -= 1
            raise self.breaks_with
        await self._misbehave(self.prompts[job_id])
        for event in _events(self.prompts[job_id], start, drafts=drafts):
            yield event
            if event.HasField("committed"):
                await self._after(job_id, event.committed.canvas_index)

    async def _after(self, job_id: str, canvas_index: int) -> None:
        if canvas_index in self.breaks_after:
            self.breaks_after.remove(canvas_index)
            if self.forgets:
                del self.parsed[job_id]
            raise self.breaks_with
        if canvas_index == self.holds_after:
            await self._hang()

    async def _misbehave(self, prompt: str) -> None:
        if prompt == "!bug":
            raise ZeroDivisionError("a bug with a secret")
        if prompt == "!cancelled":
            raise JobCancelled("job x was cancelled")
        if prompt == "!full":
            raise EaselError("a plain error", retry_after_ms=250)
        if prompt == "!hang":
            await self._hang()

    async def _hang(self) -> None:
        self.hanging.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.left.set()

    def _job(self, job_id: str) -> jobs_pb2.Job:
        if job_id not in self.parsed:
            raise JobNotFound(f"no job has the id {job_id!r}")
        return jobs_pb2.Job(
            job_id=job_id,
            state=jobs_pb2.JOB_STATE_SUCCEEDED,
            priority=generation_pb2.PRIORITY_NORMAL,
            finish_reason=generation_pb2.FINISH_REASON_EOS,
            usage=convert.usage_to_proto(USAGE),
            replica="r0",
            seed=self.parsed[job_id].spec.sampling.seed,
            created_at=convert.timestamp_to_proto(1_700_000_000_123),
            history=self.history,
            losses=len(self.history),
        )


def canvases(prompt: str) -> list[Canvas]:
    """The reversed prompt in two canvases."""
    text = prompt[::-1]
    parts = (text[: len(text) // 2], text[len(text) // 2 :])
    return [
        Canvas(index, (65,) * 8, tuple(ord(c) for c in part), part, 3 + index, 0.25) for index, part in enumerate(parts)
    ]


def _events(prompt: str, start: int, *, drafts: bool) -> list[generation_pb2.GenerateEvent]:
    events = []
    for canvas in canvases(prompt)[start:]:
        if drafts:
            events.append(convert.draft_event(Draft(canvas.index, 1, "?" * 8, 1.5, 4), "r0"))
        events.append(convert.committed_event(canvas))
    return [*events, convert.finished_event(FinishReason.EOS, USAGE, "r0")]


@asynccontextmanager
async def serve(router: FakeRouter, port: int = 0) -> AsyncIterator[str]:
    """Serve a router on a port of this machine, by default a free one; yields its address."""
    server = grpc.aio.server(
        interceptors=(EdgeInterceptor(max_request_bytes=MAX_REQUEST_BYTES),),
        options=server_options(MAX_REQUEST_BYTES),
    )
    generation_pb2_grpc.add_GenerationServicer_to_server(router, server)
    jobs_pb2_grpc.add_JobsServicer_to_server(router, server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(router, server)
    add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)


@dataclass(frozen=True)
class Served:
    """A router on a thread of its own, for commands, which bring their own event loop."""

    router: FakeRouter
    address: str


@contextmanager
def serve_in_thread() -> Iterator[Served]:
    """Serve a router until the end of the block."""
    started, stop = threading.Event(), asyncio.Event()
    found: list[Served] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        router = FakeRouter()
        async with serve(router) as address:
            found.append(Served(router, address))
            loops.append(asyncio.get_running_loop())
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield found[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
