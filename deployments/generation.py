"""The Generation service: one job, one call, and the job ends when its last caller leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

import grpc

from cluster.errors import EaselError
from cluster.rpc import convert
from cluster.rpc.auth import caller, retold
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.easel.v1 import generation_pb2_grpc as v1_grpc
from deployments.intake import Intake, Ticket
from deployments.supervisor import Supervisor

logger = logging.getLogger(__name__)

DEADLINE_SLACK_S = 0.05

GenerateContext = grpc.aio.ServicerContext[v1.GenerateRequest, v1.GenerateResponse]
StreamContext = grpc.aio.ServicerContext[v1.GenerateRequest, v1.GenerateEvent]


class GenerationService(v1_grpc.GenerationServicer):
    """Serves easel.v1.Generation on one router."""

    def __init__(self, intake: Intake, supervisor: Supervisor) -> None:
        self._intake = intake
        self._supervisor = supervisor
        self._cancelling: set[asyncio.Task[None]] = set()

    async def Generate(  # noqa: N802 - named by the proto
        self, request: v1.GenerateRequest, context: GenerateContext
    ) -> v1.GenerateResponse:
        """See generation.proto."""
        who = caller()
        with retold(who):
            ticket = await self._admitted(request, context.time_remaining(), drafts=False)
        response = v1.GenerateResponse(
            job_id=who.shown(ticket.spec.job_id), model=self._intake.card.name, seed=ticket.spec.sampling.seed
        )
        with retold(who), self._caller(ticket):
            async with aclosing(self._intake.events(ticket.spec.job_id, ticket.feed)) as events:
                async for event in events:
                    _add(response, event)
        return response

    async def StreamGenerate(  # noqa: N802 - named by the proto
        self, request: v1.GenerateRequest, context: StreamContext
    ) -> AsyncIterator[v1.GenerateEvent]:
        """See generation.proto."""
        who = caller()
        with retold(who):
            ticket = await self._admitted(request, context.time_remaining(), drafts=True)
        with retold(who), self._caller(ticket):
            yield convert.accepted_event(
                who.shown(ticket.spec.job_id),
                len(ticket.spec.prompt_tokens),
                self._intake.card.name,
                ticket.spec.sampling.seed,
                joined=ticket.joined,
            )
            stream = self._intake.events(ticket.spec.job_id, ticket.feed, drafts=request.drafts)
            async with aclosing(stream) as events:
                async for event in events:
                    yield event

    async def close(self, timeout_s: float) -> None:
        """Wait for cancels under way."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=timeout_s)

    async def _admitted(self, request: v1.GenerateRequest, left_s: float | None, *, drafts: bool) -> Ticket:
        return await self._intake.admit(request, caller(), deadline_s=left_s, drafts=drafts, abandoned=self._left)

    @contextmanager
    def _caller(self, ticket: Ticket) -> Iterator[None]:
        """Count a caller in and out: the last one that leaves takes the job with it."""
        feed = ticket.feed
        if feed is None:
            yield
            return
        feed.attached += 1
        try:
            yield
        finally:
            feed.attached -= 1
            self._left(ticket)

    def _left(self, ticket: Ticket) -> None:
        feed = ticket.feed
        if feed is not None and not feed.attached and not feed.ended and not _at_deadline(ticket):
            self._cancel_later(ticket.spec.job_id)

    def _cancel_later(self, job_id: str) -> None:
        """Cancel beside the call: the call itself is being cancelled and can await nothing more."""
        task = asyncio.create_task(self._cancel(job_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, job_id: str) -> None:
        try:
            await self._supervisor.cancel(job_id)
        except EaselError as error:
            logger.warning("job %s: its caller left, but it could not be cancelled: %s", job_id, error)


def _add(response: v1.GenerateResponse, event: v1.GenerateEvent) -> None:
    if event.HasField("committed"):
        response.text += event.committed.text
        response.token_ids.extend(event.committed.token_ids)
    elif event.HasField("finished"):
        response.finish_reason = event.finished.finish_reason
        response.usage.CopyFrom(event.finished.usage)
        response.replica = event.finished.replica


def _at_deadline(ticket: Ticket) -> bool:
    """True when the caller left because time was up: the supervisor then records a missed deadline, no cancel."""
    if ticket.deadline_s is None:
        return False
    return asyncio.get_running_loop().time() >= ticket.deadline_s - DEADLINE_SLACK_S
