"""The job store: one method per transition, one round trip per call. Redis decides, in Lua; this only asks.

Every call is bounded by the timeouts of its client (cluster.jobs.connection.connect) and raises Unavailable
when Redis cannot be used. A write repeated word for word is answered like the first one, so that a caller
whose answer was lost can ask again; a release or reap repeated is refused, because the job has moved on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from cluster.core import FinishReason, Placement, Usage
from cluster.jobs.connection import connect, redis_errors
from cluster.jobs.keys import checked_id
from cluster.jobs.paging import checked_page_size, cursor_of, token_of
from cluster.jobs.processes import Processes
from cluster.jobs.records import (
    LISTED_FIELDS,
    Checkpoint,
    JobFailure,
    JobPage,
    JobRecord,
    NewJob,
    pairs,
    parse_record,
    parse_usage,
    short,
)
from cluster.jobs.refusals import not_found
from cluster.jobs.scripts import Call
from cluster.jobs.states import AttemptEnd, JobState

__all__ = ["JobStore", "connect"]

_SCANNED_PER_CALL = 1000
_LIST_CALLS = 16

Canvases = list[bytes]
Row = list[bytes]


class JobStore(Processes):
    """Jobs, slots and leases of one namespace. Owns its Redis client and closes it."""

    async def submit(self, job: NewJob) -> tuple[bool, Placement | None]:
        """Store a job and place what can be placed. Returns whether it is new, and where it runs if it does.

        Raises RequestIdReused when the id has another digest, QueueFull at the limit of waiting jobs or of images.
        """
        timeout_ms = "" if job.timeout_ms is None else job.timeout_ms
        who = (job.digest, job.spec, int(job.priority), job.tenant, str(job.seed))
        where = (checked_id("router", job.router), self._limits.queue_limit)
        bounds = (self._limits.image_limit_bytes, int(self._has_quotas))
        args = (job.job_id, *who, job.prompt_tokens, timeout_ms, *where, job.images, *bounds)
        submit = self._call("submit", (self._keys.job(job.job_id), self._keys.images(job.job_id)), args)
        created, assigned = await self._run_all((submit, self._assign(job.job_id)), job.job_id, "submit")
        row = cast("list[bytes]", assigned)[1:]
        return created == 1, _placement(job.job_id, row)

    async def placement(self, job_id: str) -> Placement | None:
        """Where a RUNNING job runs; None in every other state. Raises JobNotFound."""
        fields = ("state", "replica", "address", "epoch", "canvases", "router")
        with redis_errors(self._limits.retry_after_ms):
            row = await self._redis.hmget(self._keys.job(job_id), fields)
        if row[0] is None:
            raise not_found(job_id)
        return _placement(job_id, cast("list[bytes]", row))

    async def epochs(self, job_ids: Sequence[str]) -> dict[str, int]:
        """The epoch of each job that runs; of one that does not, the epoch that its next run would have.

        Jobs that do not exist are left out.
        """
        with redis_errors(self._limits.retry_after_ms):
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hmget(self._keys.job(job_id), ("state", "epoch"))
            rows = cast("list[Row]", await pipeline.execute())
        known = {job_id: row for job_id, row in zip(job_ids, rows, strict=True) if row[0] is not None}
        return {job_id: int(epoch) + (state.decode() != JobState.RUNNING) for job_id, (state, epoch) in known.items()}

    async def commit(
        self,
        job_id: str,
        epoch: int,
        index: int,
        canvas: bytes,
        *,
        tokens: int,
        denoising_steps: int,
        finish: FinishReason | None = None,
    ) -> Usage | None:
        """Append canvas `index`; with `finish` it is the last one and the job ends in the same script.

        Returns what the job took when it ended, else None.

        Raises StaleEpoch for an old epoch, TransitionError for a job that does not run, a gap, or other bytes
        under an index that is taken.
        """
        keys = (self._keys.job(job_id), self._keys.canvases(job_id))
        args = (job_id, epoch, index, canvas, tokens, denoising_steps, finish.value if finish else "")
        tried = f"commit of canvas {index} under epoch {epoch}"
        return parse_usage(cast("list[bytes]", await self._run(self._call("commit", keys, args), job_id, tried)))

    async def save_checkpoint(self, job_id: str, epoch: int, checkpoint: Checkpoint) -> None:
        """Keep the canvas in progress of a job that runs on; one of a canvas that is committed is dropped.

        Raises StaleEpoch for an old epoch, TransitionError when it does not run.
        """
        keys = (self._keys.job(job_id), self._keys.checkpoint(job_id))
        call = self._call("checkpoint", keys, (job_id, epoch, *_saved(checkpoint)))
        await self._run(call, job_id, f"checkpoint under epoch {epoch}")

    async def checkpoint(self, job_id: str) -> Checkpoint | None:
        """The canvas in progress of a job, if one was saved since its last commit."""
        with redis_errors(self._limits.retry_after_ms):
            row = await self._redis.hmget(self._keys.checkpoint(job_id), ("version", "canvas_index", "step", "payload"))
        if row[0] is None:
            return None
        version, canvas_index, step, payload = cast("list[bytes]", row)
        return Checkpoint(version.decode(), int(canvas_index), int(step), payload)

    async def images(self, job_id: str) -> bytes | None:
        """The images that a job brought, as they were submitted; None for one that brought none, or has ended."""
        with redis_errors(self._limits.retry_after_ms):
            return cast("bytes | None", await self._redis.get(self._keys.images(job_id)))

    async def release(
        self,
        job_id: str,
        epoch: int,
        end: AttemptEnd,
        message: str,
        *,
        checkpoint: Checkpoint | None = None,
        hand_over: bool = False,
    ) -> None:
        """Give a running job back to the queue. `hand_over`: its router may be gone, so another live one gets it.

        A job that was lost too often fails instead. Raises StaleEpoch for an old epoch, TransitionError when it
        does not run.
        """
        keys = (self._keys.job(job_id), self._keys.checkpoint(job_id))
        saved = () if checkpoint is None else _saved(checkpoint)
        args = (job_id, epoch, end.value, short(message), int(end.is_loss), int(hand_over), *saved)
        await self._run(self._call("release", keys, args), job_id, f"release under epoch {epoch}")

    async def reap(self, job_id: str, epoch: int, end: AttemptEnd, message: str) -> None:
        """The owner lost the replica that ran the job: back to the queue, and no more jobs for that replica until
        its next heartbeat.

        A job that was lost too often fails instead. Raises StaleEpoch for an old epoch, TransitionError when it
        does not run.
        """
        call = self._on_job("reap", job_id, epoch, end.value, short(message), int(end.is_loss))
        await self._run(call, job_id, f"reap under epoch {epoch}")

    async def finish(self, job_id: str, epoch: int, reason: FinishReason) -> Usage | None:
        """The answer is whole; returns what the job took.

        Raises StaleEpoch for an old epoch, TransitionError when it does not run.
        """
        call = self._on_job("finish", job_id, epoch, reason.value)
        return parse_usage(cast("list[bytes]", await self._run(call, job_id, f"finish under epoch {epoch}")))

    async def fail(self, job_id: str, failure: JobFailure, *, epoch: int | None = None) -> None:
        """The job ends without a whole answer: its replica says so with an epoch, its owner without.

        Raises StaleEpoch for an old epoch, TransitionError for a job that has ended.
        """
        said = (failure.code, failure.reason, short(failure.message))
        tried = "fail by its owner" if epoch is None else f"fail under epoch {epoch}"
        await self._run(self._on_job("fail", job_id, "" if epoch is None else epoch, *said), job_id, tried)

    async def cancel(self, job_id: str) -> JobRecord:
        """Stop a job; one that has ended is returned as it is. Raises JobNotFound."""
        call = self._on_job("cancel", job_id)
        now_ms, *flat = cast("list[bytes]", await self._run(call, job_id, "cancel"))
        return parse_record(job_id, pairs(flat), int(now_ms))

    async def get(self, job_id: str) -> JobRecord:
        """A job as it stands. Raises JobNotFound."""
        with redis_errors(self._limits.retry_after_ms):
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.time()
            pipeline.hgetall(self._keys.job(job_id))
            (seconds, micros), fields = await pipeline.execute()
        if not fields:
            raise not_found(job_id)
        named = {name.decode(): value for name, value in fields.items()}
        return parse_record(job_id, named, seconds * 1000 + micros // 1000)

    async def canvases(self, job_id: str, from_index: int = 0) -> Canvases:
        """Committed canvases from `from_index` on, in order; none for a job that does not exist."""
        with redis_errors(self._limits.retry_after_ms):
            entries = await self._redis.xrange(self._keys.canvases(job_id), min=str(from_index + 1))
        return [fields[b"c"] for _, fields in cast("list[tuple[bytes, dict[bytes, bytes]]]", entries)]

    # Last in the class: behind it `list` means this method.
    async def list(
        self, *, page_size: int, page_token: str = "", state: JobState | None = None, tenant: str = ""
    ) -> JobPage:
        """One page of jobs, newest first, without their specs and histories.

        Those that were stored under a tenant's own ids (cluster.security.identity) are listed for it alone.

        A filtered page that looked at 16,000 jobs comes back short. Raises InvalidRequest for a page_size
        outside [1, 1000] or a page_token that no page ended with.
        """
        jobs: tuple[JobRecord, ...] = ()
        room, cursor = checked_page_size(page_size), cursor_of(page_token)
        wanted = ("" if state is None else state.value, tenant, *LISTED_FIELDS)
        for _ in range(_LIST_CALLS):
            where = (cursor, room - len(jobs), _SCANNED_PER_CALL)
            reply = await self._run(Call("list", self._fixed, (*where, *wanted)))
            now_ms, last, rows = cast("tuple[int, bytes, tuple[tuple[bytes, ...], ...]]", reply)
            jobs += tuple(_listed(row, now_ms) for row in rows)
            if not last or len(jobs) == room:
                break
            cursor = f"({last.decode()}"
        return JobPage(jobs, token_of(last.decode()))


def _saved(checkpoint: Checkpoint) -> tuple[str | bytes | int, ...]:
    return checkpoint.version, checkpoint.canvas_index, checkpoint.step, checkpoint.payload


def _placement(job_id: str, row: Row) -> Placement | None:
    """Of the fields state, replica, address, epoch, canvases, router."""
    if not row or row[0].decode() != JobState.RUNNING:
        return None
    _, replica, address, epoch, canvases, router = row
    return Placement(job_id, replica.decode(), address.decode(), int(epoch), int(canvases), router.decode())


def _listed(row: tuple[bytes | None, ...], now_ms: int) -> JobRecord:
    job_id, *values = row
    fields = {name: value for name, value in zip(LISTED_FIELDS, values, strict=True) if value is not None}
    return parse_record((job_id or b"").decode(), fields, now_ms)
