"""What a client gets: plain frozen values, made from the messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from cluster.core import FinishReason, Priority, ReplicaRow, Usage
from cluster.rpc import convert
from cluster.rpc.easel.v1 import cluster_pb2, generation_pb2, jobs_pb2


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. The same prompt with this `seed` gives it again."""

    job_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    model: str
    replica: str
    seed: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of a stream: the job is in the cluster's state. `joined` tells that it was there before."""

    job_id: str
    prompt_tokens: int
    model: str
    seed: int
    joined: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """The canvas in progress after one denoising step; never final. `mean_entropy` is in nats a position."""

    canvas_index: int
    step: int
    text: str
    mean_entropy: float
    accepted_tokens: int
    replica: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A canvas that is final and stored. The texts of all canvases, in order, are the answer's text."""

    canvas_index: int
    text: str
    token_ids: tuple[int, ...]
    denoising_steps: int
    mean_entropy: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream that succeeded."""

    finish_reason: FinishReason
    usage: Usage
    replica: str


Event = Accepted | Draft | Committed | Finished


@dataclass(frozen=True, slots=True)
class JobProblem:
    """Why a job failed: a stable word for programs, and a line for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """A run of a job that ended before the job did: on which replica, from when to when, and why (see jobs.proto).

    `epoch` tells which attempt it was, from 1.
    """

    epoch: int
    replica: str
    reason: str
    message: str
    started_at: datetime
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it stands. `state` is queued, running, succeeded, failed or cancelled; the last three are
    final.

    `text` and `token_ids` are what is committed so far, and empty in a listing. `history` has the attempts that
    ended early, oldest first; `losses` counts those lost in a row. Times are in UTC.
    """

    job_id: str
    state: str
    priority: Priority
    tenant: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: Usage
    problem: JobProblem | None
    replica: str
    seed: int
    created_at: datetime
    finished_at: datetime | None
    deadline_at: datetime | None
    history: tuple[JobAttempt, ...] = ()
    losses: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster at one moment. `version` is that of the router that answered.

    `pending` tells, in lines for people, what replicas without a place wait for, and why others do not start.
    `max_replicas` is 0 where the number of replicas is fixed; else load brings it between `min_replicas` and that.
    """

    replicas: tuple[ReplicaRow, ...]
    slots: int
    active: int
    queued: int
    queue_limit: int
    routers: tuple[str, ...]
    version: str
    pending: tuple[str, ...] = ()
    min_replicas: int = 0
    max_replicas: int = 0


def answer_from_proto(message: generation_pb2.GenerateResponse) -> Answer:
    """Raises ValueError when the router sent no finish reason, or one that this client does not know."""
    return Answer(
        job_id=message.job_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finished_with(message.finish_reason),
        usage=convert.usage_from_proto(message.usage),
        model=message.model,
        replica=message.replica,
        seed=message.seed,
    )


def _finished_with(value: generation_pb2.FinishReason.ValueType) -> FinishReason:
    reason = convert.finish_reason_from_proto(value)
    if reason is None:
        raise ValueError("the router ended an answer without a finish reason")
    return reason


def event_from_proto(message: generation_pb2.GenerateEvent) -> Event | None:
    """None for an event that is newer than this client."""
    kind = message.WhichOneof("event")
    if kind == "accepted":
        accepted = message.accepted
        return Accepted(accepted.job_id, accepted.prompt_tokens, accepted.model, accepted.seed, accepted.joined)
    if kind == "draft":
        return _draft(message.draft)
    if kind == "committed":
        return _committed(message.committed)
    if kind == "finished":
        end = message.finished
        return Finished(_finished_with(end.finish_reason), convert.usage_from_proto(end.usage), end.replica)
    return None


def _draft(message: generation_pb2.Draft) -> Draft:
    return Draft(
        canvas_index=message.canvas_index,
        step=message.step,
        text=message.text,
        mean_entropy=message.mean_entropy,
        accepted_tokens=message.accepted_tokens,
        replica=message.replica,
    )


def _committed(message: generation_pb2.Committed) -> Committed:
    return Committed(
        canvas_index=message.canvas_index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        denoising_steps=message.denoising_steps,
        mean_entropy=message.mean_entropy,
    )


def assemble(events: Iterable[Event]) -> Answer:
    """The whole answer of a stream read from canvas 0. Raises ValueError when the stream is not whole."""
    accepted: Accepted | None = None
    finished: Finished | None = None
    canvases: list[Committed] = []
    for event in events:
        if isinstance(event, Accepted):
            accepted = event
        elif isinstance(event, Committed):
            canvases.append(event)
        elif isinstance(event, Finished):
            finished = event
    if accepted is None or finished is None:
        raise ValueError("the stream is not whole: accepted or finished is missing")
    return _answer(accepted, canvases, finished)


def _answer(accepted: Accepted, canvases: list[Committed], finished: Finished) -> Answer:
    return Answer(
        job_id=accepted.job_id,
        text="".join(canvas.text for canvas in canvases),
        token_ids=tuple(token for canvas in canvases for token in canvas.token_ids),
        finish_reason=finished.finish_reason,
        usage=finished.usage,
        model=accepted.model,
        replica=finished.replica,
        seed=accepted.seed,
    )


def job_from_proto(message: jobs_pb2.Job) -> JobView:
    """Raises ValueError for a state or priority that this client does not know."""
    problem = None
    if message.HasField("error"):
        problem = JobProblem(message.error.reason, message.error.message)
    return JobView(
        job_id=message.job_id,
        state=convert.job_state_from_proto(message.state) or "unknown",
        priority=convert.priority_from_proto(message.priority),
        tenant=message.tenant,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=convert.finish_reason_from_proto(message.finish_reason),
        usage=convert.usage_from_proto(message.usage),
        problem=problem,
        replica=message.replica,
        seed=message.seed,
        created_at=convert.timestamp_from_proto(message.created_at),
        finished_at=convert.timestamp_from_proto(message.finished_at) if message.HasField("finished_at") else None,
        deadline_at=convert.timestamp_from_proto(message.deadline_at) if message.HasField("deadline_at") else None,
        history=tuple(_attempt(attempt) for attempt in message.history),
        losses=message.losses,
    )


def _attempt(message: jobs_pb2.JobAttempt) -> JobAttempt:
    return JobAttempt(
        epoch=message.epoch,
        replica=message.replica,
        reason=message.reason,
        message=message.message,
        started_at=convert.timestamp_from_proto(message.started_at),
        ended_at=convert.timestamp_from_proto(message.ended_at),
    )


def cluster_from_proto(message: cluster_pb2.ClusterStatus) -> ClusterView:
    """The answer of Cluster.GetStatus."""
    return ClusterView(
        replicas=tuple(convert.replica_from_proto(replica) for replica in message.replicas),
        slots=message.slots,
        active=message.active,
        queued=message.queued,
        queue_limit=message.queue_limit,
        routers=tuple(message.routers),
        version=message.version,
        pending=tuple(message.pending),
        min_replicas=message.min_replicas,
        max_replicas=message.max_replicas,
    )
