"""What the job store takes and gives: plain records, and how they are read from Redis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.core import FinishReason, Priority, ReplicaRow, Usage
from cluster.jobs.states import JobState


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to submit. `spec` is a serialised easel.internal.v1.JobSpec, `digest` tells bodies apart.

    `timeout_ms` counts from the moment Redis accepts the job; None means no deadline. `router` is the owner. `images`
    is a serialised easel.internal.v1.JobImages, empty for a job without images.
    """

    job_id: str
    digest: str
    spec: bytes
    priority: Priority
    tenant: str
    seed: int
    prompt_tokens: int
    timeout_ms: int | None
    router: str
    images: bytes = b""


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job failed: `code` is a google.rpc code number, `reason` a stable word, `message` one line."""

    code: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """A run that ended before its job did; `reason` is a word of AttemptEnd. Times as in JobRecord."""

    epoch: int
    replica: str
    reason: str
    message: str
    started_ms: int
    ended_ms: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A canvas in progress as its engine wrote it: what deployments.engine.api.CanvasCheckpoint holds."""

    version: str
    canvas_index: int
    step: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it stood at `now_ms`. Times are ms since the Unix epoch by the clock of Redis.

    `replica` has or had the job last, "" before the first assignment. `losses` counts the runs lost since the last
    canvas; `history` holds the last runs that ended early, oldest first. `spec` and `history` are empty in a list.
    """

    job_id: str
    state: JobState
    digest: str
    spec: bytes
    priority: Priority
    tenant: str
    seed: int
    router: str
    replica: str
    epoch: int
    attempts: int
    preemptions: int
    canvases: int
    generated_tokens: int
    denoising_steps: int
    prompt_tokens: int
    finish_reason: FinishReason | None
    failure: JobFailure | None
    created_ms: int
    started_ms: int | None
    finished_ms: int | None
    deadline_ms: int | None
    now_ms: int
    losses: int = 0
    history: tuple[JobAttempt, ...] = ()

    @property
    def usage(self) -> Usage:
        """What the job took so far; it waits until its first assignment and runs from there on."""
        end_ms = self.now_ms if self.finished_ms is None else self.finished_ms
        started_ms = end_ms if self.started_ms is None else self.started_ms
        return Usage(
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            canvases=self.canvases,
            denoising_steps=self.denoising_steps,
            attempts=self.attempts,
            preemptions=self.preemptions,
            queue_ms=started_ms - self.created_ms,
            run_ms=end_ms - started_ms,
        )


@dataclass(frozen=True, slots=True)
class ReplicaHello:
    """What a replica says with every heartbeat."""

    replica: str
    address: str
    model: str
    version: str
    slots: int
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AssignedJob:
    """A job that holds a slot of a replica, and the epoch under which it may write; `preempt` tells it to go."""

    job_id: str
    epoch: int
    preempt: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaOrders:
    """What Redis answers a replica's heartbeat: what it runs, and whether it is to drain."""

    assigned: tuple[AssignedJob, ...]
    draining: bool


@dataclass(frozen=True, slots=True)
class JobPage:
    """Jobs, newest first; `next_token` is empty on the last page. A page can be shorter than asked for."""

    jobs: tuple[JobRecord, ...]
    next_token: str


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Replicas (those whose lease has ended show 0 ms left), live routers and the number of waiting jobs."""

    replicas: tuple[ReplicaRow, ...]
    routers: tuple[str, ...]
    queued: int


# What one message may add to a record: failures and the history of attempts stay small.
_MESSAGE_CHARS = 500


def short(message: str) -> str:
    """`message` as a record keeps it: cut at 500 characters, and fit to be UTF-8."""
    cut = message if len(message) <= _MESSAGE_CHARS else message[: _MESSAGE_CHARS - 3] + "..."
    return cut.encode(errors="replace").decode()


# The fields of a record that a list shows, in the order lua/list.lua is asked for; `state` must be the first.
LISTED_FIELDS = (
    *(
        "state",
        "digest",
        "priority",
        "tenant",
        "seed",
        "router",
        "replica",
        "epoch",
        "attempts",
        "preemptions",
        "losses",
    ),
    *("canvases", "generated_tokens", "denoising_steps", "prompt_tokens", "finish_reason"),
    *("failure_code", "failure_reason", "failure_message"),
    *("created_ms", "started_ms", "finished_ms", "deadline_ms"),
)


def pairs(flat: Iterable[bytes]) -> dict[str, bytes]:
    """A flat reply [field, value, field, value, ...] as a mapping."""
    values = iter(flat)
    return {name.decode(): value for name, value in zip(values, values, strict=True)}


def parse_record(job_id: str, fields: Mapping[str, bytes], now_ms: int) -> JobRecord:
    """The record that the hash of a job holds. Raises KeyError when a field is missing."""

    def text(name: str) -> str:
        return fields.get(name, b"").decode()

    def number_or_none(name: str) -> int | None:
        return int(fields[name]) if fields.get(name) else None

    reason = text("finish_reason")
    return JobRecord(
        job_id=job_id,
        state=JobState(text("state")),
        digest=text("digest"),
        spec=fields.get("spec", b""),
        priority=Priority(int(fields["priority"])),
        tenant=text("tenant"),
        seed=int(fields["seed"]),
        router=text("router"),
        replica=text("replica"),
        epoch=int(fields["epoch"]),
        attempts=int(fields["attempts"]),
        preemptions=int(fields["preemptions"]),
        canvases=int(fields["canvases"]),
        generated_tokens=int(fields["generated_tokens"]),
        denoising_steps=int(fields["denoising_steps"]),
        prompt_tokens=int(fields["prompt_tokens"]),
        finish_reason=FinishReason(reason) if reason else None,
        failure=_parse_failure(fields),
        created_ms=int(fields["created_ms"]),
        started_ms=number_or_none("started_ms"),
        finished_ms=number_or_none("finished_ms"),
        deadline_ms=number_or_none("deadline_ms"),
        now_ms=now_ms,
        losses=int(fields.get("losses", 0)),
        history=_parse_history(fields.get("history", b"")),
    )


def _parse_history(text: bytes) -> tuple[JobAttempt, ...]:
    """What lua/lib/requeue.lua keeps, a JSON array of rows; each ends with '1' where it was a loss."""
    return tuple(JobAttempt(*row[:6]) for row in json.loads(text or b"[]"))


def parse_usage(row: list[bytes]) -> Usage | None:
    """What lua/lib/usage.lua says of a job that has ended; None for the empty reply of one that runs on."""
    if not row:
        return None
    created_ms, started_ms, finished_ms, prompt, generated, canvases, steps, attempts, preemptions = map(int, row)
    return Usage(
        prompt_tokens=prompt,
        generated_tokens=generated,
        canvases=canvases,
        denoising_steps=steps,
        attempts=attempts,
        preemptions=preemptions,
        queue_ms=started_ms - created_ms,
        run_ms=finished_ms - started_ms,
    )


def _parse_failure(fields: Mapping[str, bytes]) -> JobFailure | None:
    if not fields.get("failure_code"):
        return None
    return JobFailure(
        code=int(fields["failure_code"]),
        reason=fields["failure_reason"].decode(),
        message=fields["failure_message"].decode(),
    )


def parse_replica(row: list[bytes]) -> ReplicaRow:
    """A row of lua/view.lua: replica, lease, active, address, model, version, slots, stats, draining."""
    replica, _, _, address, model, version = (value.decode() if isinstance(value, bytes) else "" for value in row[:6])
    return ReplicaRow(
        replica=replica,
        address=address,
        model=model,
        version=version,
        slots=int(row[6]),
        active=int(row[2]),
        lease_ms=int(row[1]),
        stats=json.loads(row[7]),
        draining=row[8] != b"",
    )


def parse_orders(draining: int, running: list[bytes]) -> ReplicaOrders:
    """What lua/heartbeat_replica.lua answers; a value is "<epoch>", or "<epoch> preempt"."""
    assigned = []
    for job_id, value in pairs(running).items():
        epoch, _, order = value.decode().partition(" ")
        assigned.append(AssignedJob(job_id, int(epoch), preempt=order == "preempt"))
    return ReplicaOrders(tuple(assigned), draining=draining == 1)
