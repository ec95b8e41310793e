"""The job store: one method per transition, one round trip per call. Redis decides, in Lua; this only asks.

Every call is bounded by the timeouts of its client (cluster.jobs.connection.connect) and raises Unavailable
when Redis cannot be used. A write repeated word for word is answered like the first one, so that a caller
whose answer was lost can ask again.
"""

from __future__ import annotations

import json
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from cluster.core import FinishReason, Placement, Usage
from cluster.errors import ConfigError
from cluster.jobs.connection import connect, redis_errors
from cluster.jobs.keys import Keys, checked_id
from cluster.jobs.paging import checked_page_size, cursor_of, token_of
from cluster.jobs.records import (
    LISTED_FIELDS,
    AssignedJob,
    ClusterView,
    JobFailure,
    JobPage,
    JobRecord,
    NewJob,
    ReplicaHello,
    pairs,
    parse_record,
    parse_replica,
    parse_usage,
)
from cluster.jobs.refusals import not_found, refusal
from cluster.jobs.scripts import Call, Reply, Scripts
from cluster.jobs.states import JobState

__all__ = ["JobStore", "connect"]

_PLACED_PER_LOOK = 256
_SCANNED_PER_CALL = 1000
_LIST_CALLS = 16

Canvases = list[bytes]
Row = list[bytes]


class JobStore:
    """Jobs, slots and leases of one namespace. Owns `redis` and closes it."""

    def __init__(
        self,
        redis: Redis,
        *,
        namespace: str = "easel",
        queue_limit: int = 1000,
        retry_after_ms: int = 1000,
        lease_ms: int = 5000,
        retention_s: int = 3600,
    ) -> None:
        limits = {"queue_limit": queue_limit, "lease_ms": lease_ms, "retention_s": retention_s}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self._redis = redis
        self._keys = Keys(namespace)
        self._fixed = self._keys.fixed
        self._scripts = Scripts(redis)
        self._queue_limit = queue_limit
        self._retry_after_ms = retry_after_ms
        self._lease_ms = lease_ms
        self._retention_s = retention_s

    async def ping(self) -> None:
        """Reach Redis and give it the scripts. Raises Unavailable, or ConfigError for refused credentials."""
        with redis_errors(self._retry_after_ms):
            # By itself first: Redis 7 hangs up on a client that owes a password and sends a large command,
            # and that would look like a Redis that is away.
            await self._redis.ping()
            await self._scripts.load()

    async def submit(self, job: NewJob) -> tuple[bool, Placement | None]:
        """Store a job and place what can be placed. Returns whether it is new, and where it runs if it does.

        Raises RequestIdReused when the id has another digest, QueueFull at the limit of waiting jobs.
        """
        timeout_ms = "" if job.timeout_ms is None else job.timeout_ms
        who = (job.job_id, job.digest, job.spec, int(job.priority), job.tenant, str(job.seed))
        args = (*who, job.prompt_tokens, timeout_ms, checked_id("router", job.router), self._queue_limit)
        submit = Call("submit", (*self._fixed, self._keys.job(job.job_id)), args)
        created, assigned = await self._run_all((submit, self._assign(job.job_id)), job.job_id)
        row = cast("list[bytes]", assigned)[1:]
        return created == 1, _placement(job.job_id, row)

    async def assign(self) -> int:
        """Place as many waiting jobs as slots allow; returns how many. Drops those past their deadline."""
        reply = cast("list[int]", await self._run(self._assign("")))
        return reply[0]

    async def placement(self, job_id: str) -> Placement | None:
        """Where a RUNNING job runs; None in every other state. Raises JobNotFound."""
        fields = ("state", "replica", "address", "epoch", "canvases")
        with redis_errors(self._retry_after_ms):
            row = await self._redis.hmget(self._keys.job(job_id), fields)
        if row[0] is None:
            raise not_found(job_id)
        return _placement(job_id, cast("list[bytes]", row))

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
        keys = (*self._fixed, self._keys.job(job_id), self._keys.canvases(job_id))
        counted = (index, canvas, tokens, denoising_steps)
        args = (job_id, epoch, *counted, finish.value if finish else "", self._retention_s)
        tried = f"commit of canvas {index} under epoch {epoch}"
        return parse_usage(cast("list[bytes]", await self._run(Call("commit", keys, args), job_id, tried)))

    async def finish(self, job_id: str, epoch: int, reason: FinishReason) -> Usage | None:
        """The answer is whole; returns what the job took.

        Raises StaleEpoch for an old epoch, TransitionError when it does not run.
        """
        args = (job_id, epoch, reason.value, self._retention_s)
        call = self._on_job("finish", job_id, args)
        return parse_usage(cast("list[bytes]", await self._run(call, job_id, f"finish under epoch {epoch}")))

    async def fail(self, job_id: str, failure: JobFailure, *, epoch: int | None = None) -> None:
        """The job ends without a whole answer: its replica says so with an epoch, its owner without.

        Raises StaleEpoch for an old epoch, TransitionError for a job that has ended.
        """
        who = (job_id, "" if epoch is None else epoch)
        args = (*who, failure.code, failure.reason, failure.message, self._retention_s)
        tried = "fail by its owner" if epoch is None else f"fail under epoch {epoch}"
        await self._run(self._on_job("fail", job_id, args), job_id, tried)

    async def cancel(self, job_id: str) -> JobRecord:
        """Stop a job; one that has ended is returned as it is. Raises JobNotFound."""
        call = self._on_job("cancel", job_id, (job_id, self._retention_s))
        now_ms, *flat = cast("list[bytes]", await self._run(call, job_id, "cancel"))
        return parse_record(job_id, pairs(flat), int(now_ms))

    async def heartbeat_replica(self, hello: ReplicaHello) -> tuple[AssignedJob, ...]:
        """Renew a replica's lease and row. Returns what Redis says it runs: it must stop anything else."""
        keys = (*self._fixed, self._keys.replica(hello.replica), self._keys.running(hello.replica))
        said = (
            hello.replica,
            hello.address,
            hello.model,
            hello.version,
            hello.slots,
            json.dumps(hello.stats),
        )
        call = Call("heartbeat_replica", keys, (*said, self._lease_ms, self._retention_s))
        running = pairs(cast("list[bytes]", await self._run(call)))
        return tuple(AssignedJob(job_id, int(epoch)) for job_id, epoch in running.items())

    async def heartbeat_router(self, router: str) -> None:
        """Renew a router's lease."""
        args = (checked_id("router", router), self._lease_ms)
        await self._run(Call("heartbeat_router", self._fixed, args))

    async def remove_replica(self, replica: str) -> None:
        """Take a replica out of the slot table at once. Jobs it still holds stay known as its own."""
        with redis_errors(self._retry_after_ms):
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.zrem(self._keys.replicas, replica)
            pipeline.delete(self._keys.replica(replica))
            await pipeline.execute()

    async def remove_router(self, router: str) -> None:
        """Give a router's lease back."""
        with redis_errors(self._retry_after_ms):
            await self._redis.zrem(self._keys.routers, router)

    async def get(self, job_id: str) -> JobRecord:
        """A job as it stands. Raises JobNotFound."""
        with redis_errors(self._retry_after_ms):
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
        with redis_errors(self._retry_after_ms):
            entries = await self._redis.xrange(self._keys.canvases(job_id), min=str(from_index + 1))
        return [fields[b"c"] for _, fields in cast("list[tuple[bytes, dict[bytes, bytes]]]", entries)]

    async def view(self) -> ClusterView:
        """Replicas, routers and the queue at one moment."""
        queued, routers, rows = cast("list[Reply]", await self._run(Call("view", self._fixed, ())))
        return ClusterView(
            replicas=tuple(parse_replica(row) for row in cast("list[list[bytes]]", rows)),
            routers=tuple(router.decode() for router in cast("list[bytes]", routers)),
            queued=cast(int, queued),
        )

    async def close(self) -> None:
        """Close the connections to Redis; whoever shares the client must be done with it."""
        await self._redis.aclose()

    # Last in the class: behind it `list` means this method.
    async def list(self, *, page_size: int, page_token: str = "", state: JobState | None = None) -> JobPage:
        """One page of jobs, newest first, without their specs.

        A filtered page that looked at 16,000 jobs comes back short. Raises InvalidRequest for a page_size
        outside [1, 1000] or a page_token that no page ended with.
        """
        jobs: tuple[JobRecord, ...] = ()
        room, cursor = checked_page_size(page_size), cursor_of(page_token)
        wanted = ("" if state is None else state.value, *LISTED_FIELDS)
        for _ in range(_LIST_CALLS):
            where = (cursor, room - len(jobs), _SCANNED_PER_CALL)
            reply = await self._run(Call("list", self._fixed, (*where, *wanted)))
            now_ms, last, rows = cast("tuple[int, bytes, tuple[tuple[bytes, ...], ...]]", reply)
            jobs += tuple(_listed(row, now_ms) for row in rows)
            if not last or len(jobs) == room:
                break
            cursor = f"({last.decode()}"
        return JobPage(jobs, token_of(last.decode()))

    def _assign(self, job_id: str) -> Call:
        return Call("assign", self._fixed, (_PLACED_PER_LOOK, self._retention_s, job_id))

    def _on_job(self, name: str, job_id: str, args: tuple[str | bytes | int, ...]) -> Call:
        return Call(name, (*self._fixed, self._keys.job(job_id)), args)

    async def _run(self, call: Call, job_id: str = "", tried: str = "") -> Reply:
        with redis_errors(self._retry_after_ms):
            try:
                return await self._scripts.run(call)
            except ResponseError as error:
                refused = refusal(error, job_id, tried, retry_after_ms=self._retry_after_ms)
                raise refused or error from None

    async def _run_all(self, calls: tuple[Call, ...], job_id: str) -> tuple[Reply, ...]:
        with redis_errors(self._retry_after_ms):
            try:
                return tuple(await self._scripts.run_all(calls))
            except ResponseError as error:
                refused = refusal(error, job_id, "submit", retry_after_ms=self._retry_after_ms)
                raise refused or error from None


def _placement(job_id: str, row: Row) -> Placement | None:
    """Of the fields state, replica, address, epoch, canvases."""
    if not row or row[0].decode() != JobState.RUNNING:
        return None
    _, replica, address, epoch, canvases = row
    return Placement(job_id, replica.decode(), address.decode(), int(epoch), int(canvases))


def _listed(row: tuple[bytes | None, ...], now_ms: int) -> JobRecord:
    job_id, *values = row
    fields = {name: value for name, value in zip(LISTED_FIELDS, values, strict=True) if value is not None}
    return parse_record((job_id or b"").decode(), fields, now_ms)
