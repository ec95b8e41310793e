"""How a job enters: checked, stored and, if a slot is free, assigned, before any compute."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.core import JobSpec, ModelCard
from cluster.engines import EngineTraits
from cluster.errors import EaselError
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.records import NewJob
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.capabilities import check_engine
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.requests import ParsedRequest, parse_generate
from cluster.security.identity import Identity
from cluster.telemetry.tracing import call_traceparent
from deployments.charge import Submission
from deployments.feed import Feed
from deployments.supervisor import Supervisor, leaving_error
from deployments.tokenizer import Tokenizer
from deployments.watch import watch_stored

TOKENIZED_IN_LOOP_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job in the cluster's state. `feed` is set when this router supervises it; `joined` when it was there before.

    `deadline_s` is on this process's monotonic clock.
    """

    spec: JobSpec
    feed: Feed | None
    joined: bool
    deadline_s: float | None = None


class Intake:
    """Checks requests against the model, and stores and joins jobs for both public services."""

    def __init__(
        self,
        *,
        name: str,
        card: ModelCard,
        tokenizer: Tokenizer,
        engine: EngineTraits,
        store: JobStore,
        doorbell: Doorbell,
        supervisor: Supervisor,
    ) -> None:
        self._name = name
        self._engine = engine
        self._tokenizer = tokenizer
        self._store = store
        self._doorbell = doorbell
        self._supervisor = supervisor
        self._admitting: set[asyncio.Task[Ticket]] = set()
        self.card = card

    async def admit(
        self,
        request: v1.GenerateRequest,
        who: Identity,
        *,
        deadline_s: float | None,
        drafts: bool,
        abandoned: Callable[[Ticket], None] = lambda _: None,
    ) -> Ticket:
        """Check and store a request, and take charge of it if it is new.

        `deadline_s` is what is left of the gRPC deadline. A caller that leaves meanwhile does not stop this half-way,
        for Redis may hold the job already: it is finished, and `abandoned` gets the ticket. The job is `who`'s, and is
        stored under its ids. Raises InvalidRequest, EngineCannot, PermissionDenied, QueueFull, QuotaExceeded,
        RequestIdReused or Unavailable; nothing is stored then.
        """
        admitting = asyncio.create_task(self._admit(request, who, deadline_s, drafts))
        self._admitting.add(admitting)
        admitting.add_done_callback(self._admitting.discard)
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            admitting.add_done_callback(lambda done: _hand_over(done, abandoned))
            raise

    async def _admit(
        self, request: v1.GenerateRequest, who: Identity, deadline_s: float | None, drafts: bool
    ) -> Ticket:
        # Before the digest is made of it: naming one's own tenant is no other request.
        request.tenant = who.tenant_of(request.tenant)
        parsed = await self._parsed(request, deadline_s)
        job_id, wants_drafts = who.stored(parsed.job_id), drafts and parsed.spec.wants_drafts
        traced = call_traceparent.get()
        wanted = replace(parsed.spec, job_id=job_id, wants_drafts=wants_drafts, traceparent=traced)
        parsed = replace(parsed, job_id=job_id, spec=wanted)
        created, placement = await self._store.submit(self._new_job(parsed))
        if not created:
            record = await self._store.get(parsed.job_id)
            spec = replace(parsed.spec, sampling=replace(parsed.spec.sampling, seed=record.seed))
            return Ticket(spec, self._supervisor.feed(parsed.job_id), joined=True)
        submission = Submission(parsed.spec, _deadline(parsed.timeout_ms))
        feed = self._supervisor.begin(submission, placement)
        return Ticket(parsed.spec, feed, joined=False, deadline_s=submission.deadline_s)

    async def events(
        self, job_id: str, feed: Feed | None = None, *, from_canvas: int = 0, drafts: bool = False
    ) -> AsyncGenerator[v1.GenerateEvent, None]:
        """A job's events: from this router's own feed, or else from Redis until this router has charge of the job."""
        while True:
            feed = feed or self._supervisor.feed(job_id)
            if feed is None:
                source = self._stored(job_id, from_canvas)
            else:
                source = feed.read(from_canvas=from_canvas, drafts=drafts)
            async with aclosing(source) as events:
                async for event in events:
                    yield event
                    if event.HasField("finished"):
                        return
                    if event.HasField("committed"):
                        from_canvas = event.committed.canvas_index + 1

    def _stored(self, job_id: str, from_canvas: int) -> AsyncGenerator[v1.GenerateEvent, None]:
        def interrupted() -> EaselError | None:
            return leaving_error(self._name, job_id) if self._supervisor.leaving else None

        def until() -> bool:
            return self._supervisor.feed(job_id) is not None

        return watch_stored(self._store, self._doorbell, job_id, from_canvas, interrupted=interrupted, until=until)

    async def _parsed(self, request: v1.GenerateRequest, deadline_s: float | None) -> ParsedRequest:
        """Check a request; a long text beside the loop, so that its tokenizer does not hold up everybody's calls."""
        if request.ByteSize() <= TOKENIZED_IN_LOOP_BYTES:
            return self._parse(request, deadline_s)
        return await asyncio.to_thread(self._parse, request, deadline_s)

    def _parse(self, request: v1.GenerateRequest, deadline_s: float | None) -> ParsedRequest:
        check_engine(request, self._engine, self.card)
        return parse_generate(
            request,
            self.card,
            self._tokenizer,
            deadline_ms=None if deadline_s is None else max(1, int(deadline_s * 1000)),
            new_id=lambda: f"job-{uuid.uuid4().hex}",
            new_seed=lambda: secrets.randbits(64),
        )

    def _new_job(self, parsed: ParsedRequest) -> NewJob:
        return NewJob(
            job_id=parsed.job_id,
            digest=parsed.digest,
            spec=convert.job_spec_to_proto(parsed.spec).SerializeToString(),
            priority=parsed.spec.priority,
            tenant=parsed.spec.tenant,
            seed=parsed.spec.sampling.seed,
            prompt_tokens=len(parsed.spec.prompt_tokens),
            timeout_ms=parsed.timeout_ms,
            router=self._name,
            images=convert.images_to_bytes(parsed.images),
        )


def _deadline(timeout_ms: int | None) -> float | None:
    return None if timeout_ms is None else asyncio.get_running_loop().time() + timeout_ms / 1000


def _hand_over(admitted: asyncio.Task[Ticket], abandoned: Callable[[Ticket], None]) -> None:
    if not admitted.cancelled() and admitted.exception() is None:
        abandoned(admitted.result())
