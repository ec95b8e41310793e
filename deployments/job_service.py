"""The Jobs service: work that outlives the connection that made it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from cluster.core import Canvas
from cluster.errors import TransitionError
from cluster.jobs.records import JobAttempt, JobRecord
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.auth import caller, retold
from cluster.rpc.easel.internal.v1 import denoiser_pb2
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.easel.v1 import jobs_pb2 as jobs
from cluster.rpc.easel.v1 import jobs_pb2_grpc as jobs_grpc
from cluster.rpc.requests import check_from_canvas, check_job_id, check_within_job, parse_list, under
from cluster.security.identity import Identity
from deployments.intake import Intake
from deployments.watch import stored_canvases


class JobService(jobs_grpc.JobsServicer):
    """Serves easel.v1.Jobs on one router, for the jobs of all routers."""

    def __init__(self, intake: Intake, store: JobStore) -> None:
        self._intake = intake
        self._store = store

    async def Submit(  # noqa: N802 - named by the proto
        self, request: jobs.SubmitRequest, context: grpc.aio.ServicerContext[jobs.SubmitRequest, jobs.Job]
    ) -> jobs.Job:
        """See jobs.proto. The call's own deadline bounds the call, not the job."""
        who = caller()
        with retold(who):
            with under("request"):
                ticket = await self._intake.admit(request.request, who, deadline_s=None, drafts=True)
            if ticket.feed is not None:
                ticket.feed.attached += 1  # for good: a caller of Generate that joins and leaves must not end it
            return _job(who, await self._store.get(ticket.spec.job_id))

    async def Get(  # noqa: N802
        self, request: jobs.GetJobRequest, context: grpc.aio.ServicerContext[jobs.GetJobRequest, jobs.Job]
    ) -> jobs.Job:
        """See jobs.proto."""
        who, job_id = _named(request.job_id)
        with retold(who):
            return _job(who, await self._store.get(job_id), await stored_canvases(self._store, job_id))

    async def Watch(  # noqa: N802
        self,
        request: jobs.WatchJobRequest,
        context: grpc.aio.ServicerContext[jobs.WatchJobRequest, v1.GenerateEvent],
    ) -> AsyncIterator[v1.GenerateEvent]:
        """See jobs.proto."""
        who, job_id = _named(request.job_id)
        check_from_canvas(request.from_canvas)
        with retold(who):
            record = await self._store.get(job_id)
            self._check_offset(record, request.from_canvas)
            yield convert.accepted_event(
                who.shown(job_id), record.prompt_tokens, self._intake.card.name, record.seed, joined=True
            )
            events = self._intake.events(job_id, from_canvas=request.from_canvas, drafts=request.drafts)
            async with aclosing(events):
                async for event in events:
                    yield event

    async def Cancel(  # noqa: N802
        self,
        request: jobs.CancelJobRequest,
        context: grpc.aio.ServicerContext[jobs.CancelJobRequest, jobs.Job],
    ) -> jobs.Job:
        """See jobs.proto."""
        who, job_id = _named(request.job_id)
        with retold(who):
            record = await self._store.cancel(job_id)
            if record.state is not JobState.CANCELLED:
                raise TransitionError(f"job {job_id} cannot be cancelled: it has {record.state} already")
        return _job(who, record)

    async def List(  # noqa: N802
        self,
        request: jobs.ListJobsRequest,
        context: grpc.aio.ServicerContext[jobs.ListJobsRequest, jobs.ListJobsResponse],
    ) -> jobs.ListJobsResponse:
        """See jobs.proto."""
        query = parse_list(request)
        state = None if query.state is None else JobState(query.state)
        who = caller()
        page = await self._store.list(
            page_size=query.page_size, page_token=query.page_token, state=state, tenant=who.index
        )
        return jobs.ListJobsResponse(jobs=[_job(who, record) for record in page.jobs], next_page_token=page.next_token)

    def _check_offset(self, record: JobRecord, from_canvas: int) -> None:
        """Raises InvalidRequest for an offset that the job will never reach: its reader would wait for nothing."""
        canvases = record.canvases
        if not record.state.terminal:
            spec = denoiser_pb2.JobSpec.FromString(record.spec)
            canvases = max(canvases, self._intake.card.canvases_for(spec.sampling.max_new_tokens))
        check_within_job(from_canvas, canvases, ended=record.state.terminal)


def _named(job_id: str) -> tuple[Identity, str]:
    """Who asks, and the id under which the job is stored that they name. Another tenant's is out of reach."""
    who = caller()
    return who, who.stored(check_job_id(job_id))


def _attempt(who: Identity, attempt: JobAttempt) -> jobs.JobAttempt:
    return jobs.JobAttempt(
        replica=attempt.replica,
        reason=attempt.reason,
        message=who.retold(attempt.message),
        started_at=convert.timestamp_to_proto(attempt.started_ms),
        ended_at=convert.timestamp_to_proto(attempt.ended_ms),
        epoch=attempt.epoch,
    )


def _job(who: Identity, record: JobRecord, canvases: list[Canvas] | None = None) -> jobs.Job:
    job = jobs.Job(
        job_id=who.shown(record.job_id),
        state=convert.job_state_to_proto(record.state.value),
        priority=convert.priority_to_proto(record.priority),
        tenant=record.tenant,
        finish_reason=convert.finish_reason_to_proto(record.finish_reason),
        usage=convert.usage_to_proto(record.usage),
        replica=record.replica,
        seed=record.seed,
        created_at=convert.timestamp_to_proto(record.created_ms),
        history=[_attempt(who, attempt) for attempt in record.history],
        losses=record.losses,
    )
    if record.failure is not None:
        failure = record.failure
        said = who.retold(failure.message)
        job.error.CopyFrom(jobs.JobError(code=failure.code, reason=failure.reason, message=said))
    if record.finished_ms is not None:
        job.finished_at.CopyFrom(convert.timestamp_to_proto(record.finished_ms))
    if record.deadline_ms is not None:
        job.deadline_at.CopyFrom(convert.timestamp_to_proto(record.deadline_ms))
    for canvas in canvases or ():
        job.text += canvas.text
        job.token_ids.extend(canvas.tokens)
    return job
