"""What a job costs in Redis: bytes while it waits, while it runs, with a checkpoint, when it has ended, and afterwards.

A real redis-server, real records: a prompt of 400 tokens and 4 canvases, for DiffusionGemma 26B-A4B (canvases of 256
tokens, hidden size 2816) and for the demo checkpoint (32 tokens, hidden size 128). Bytes are Redis' used_memory with
no connection but the one that asks. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import tempfile
from collections.abc import Coroutine, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from cluster.core import Canvas, FinishReason, JobSpec, Priority, SamplingParams
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.records import Checkpoint, NewJob, ReplicaHello
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from cluster.rpc.convert import canvas_to_proto, job_spec_to_proto

JOBS = 1000
CANVASES = 4
PROMPT_TOKENS = 400
STEPS_PER_CANVAS = 27
CHECKPOINTS = 20
AT_ONCE = 16
# Long enough for all of JOBS to end within it, so that what has ended can be measured.
RETENTION_S = 4
LEASE_MS = 600_000
# After this long Redis has deleted what expired.
SETTLE_S = 1.0
# After this long it has noticed that connections were closed.
CLOSED_S = 0.2
# Each ending forgets up to this many records that have expired.
FORGOTTEN_PER_ENDING = 8
NAMESPACE = "memory"
SAMPLING = SamplingParams(
    seed=2**63,
    max_new_tokens=1024,
    max_denoising_steps=48,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    confidence_threshold=0.005,
    stability_threshold=1,
)


@dataclass(frozen=True)
class Shape:
    """A model as far as its records go; `text_per_token` is in characters."""

    name: str
    canvas_tokens: int
    hidden_size: int
    vocab_size: int
    text_per_token: int

    @property
    def checkpoint_bytes(self) -> int:
        """Mostly the self-conditioning embedding in float32; tokens and argmax history are 8 bytes a position."""
        return self.canvas_tokens * (4 * self.hidden_size + 8)


SHAPES = (Shape("26b_a4b", 256, 2816, 262_144, 4), Shape("tiny", 32, 128, 288, 1))


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes per job, and what is left of 1000 jobs when they have expired."""

    spec_bytes: int
    queued_bytes: float
    running_bytes: float
    checkpoint_bytes: float
    finished_bytes: float
    expired_bytes: float
    keys_left: int


class Bench:
    """One shape against one fresh server."""

    def __init__(self, shape: Shape, url: str) -> None:
        self._shape = shape
        self._redis: Redis = connect(url, timeout_s=10.0)
        self._keys = Keys(NAMESPACE)
        limits = {"queue_limit": 2 * JOBS, "lease_ms": LEASE_MS, "retention_s": RETENTION_S}
        self._store = JobStore(self._redis, namespace=NAMESPACE, **limits)
        self._random = random.Random(0)
        self._epochs: dict[str, int] = {}

    async def run(self) -> MemoryFigures:
        """Take JOBS jobs through their life, looking at the memory between the stages."""
        try:
            await self._store.ping()
            # A first job, to the end: the server's own tables and scripts are no job's cost.
            await self._life(["first"])
            return await self._measure([f"job-{number:032x}" for number in range(JOBS)])
        finally:
            await self._store.close()

    async def _measure(self, jobs: list[str]) -> MemoryFigures:
        await self._forget(1)
        base_bytes = await self._used_bytes()
        await self._submit(jobs)
        queued_bytes = await self._used_bytes()
        await self._place(jobs)
        await self._commit(jobs, range(CANVASES - 1))
        running_bytes = await self._used_bytes()
        await each(self._checkpoint(job) for job in jobs[:CHECKPOINTS])
        with_checkpoint_bytes = await self._used_bytes()
        await self._commit(jobs, range(CANVASES - 1, CANVASES))
        finished_bytes = await self._used_bytes()
        await self._forget(2 * JOBS)
        return MemoryFigures(
            spec_bytes=len(self._spec(jobs[0])),
            queued_bytes=(queued_bytes - base_bytes) / JOBS,
            running_bytes=(running_bytes - base_bytes) / JOBS,
            checkpoint_bytes=(with_checkpoint_bytes - running_bytes) / CHECKPOINTS,
            finished_bytes=(finished_bytes - base_bytes) / JOBS,
            expired_bytes=(await self._used_bytes() - base_bytes) / JOBS,
            keys_left=await self._left(),
        )

    async def _life(self, jobs: list[str]) -> None:
        await self._submit(jobs)
        await self._place(jobs)
        await self._commit(jobs, range(CANVASES))

    async def _submit(self, jobs: list[str]) -> None:
        """With no slot free they wait."""
        await self._store.heartbeat_replica(replica(slots=0))
        await each(self._store.submit(self._new_job(job)) for job in jobs)

    async def _place(self, jobs: list[str]) -> None:
        await self._store.heartbeat_replica(replica(slots=len(jobs)))
        while await self._store.assign():
            pass
        for job in jobs:
            record = await self._store.get(job)
            assert record.state is JobState.RUNNING
            self._epochs[job] = record.epoch

    async def _commit(self, jobs: list[str], indices: Iterable[int]) -> None:
        for index in indices:
            await each(self._commit_one(job, index) for job in jobs)

    async def _commit_one(self, job: str, index: int) -> None:
        await self._store.commit(
            job,
            self._epochs[job],
            index,
            self._canvas(index),
            tokens=self._shape.canvas_tokens,
            denoising_steps=STEPS_PER_CANVAS,
            finish=FinishReason.LENGTH if index == CANVASES - 1 else None,
        )

    async def _checkpoint(self, job: str) -> None:
        payload = self._random.randbytes(self._shape.checkpoint_bytes)
        await self._store.save_checkpoint(job, self._epochs[job], Checkpoint("v" * 64, CANVASES - 1, 12, payload))

    async def _forget(self, ended: int) -> None:
        """Let the records of `ended` jobs expire, and end as few more as clear the index of them; one stays."""
        while True:
            await asyncio.sleep(RETENTION_S + SETTLE_S)
            endings = -(-ended // FORGOTTEN_PER_ENDING)
            await self._life([f"after-{ended}-{number}" for number in range(endings)])
            if endings == 1:
                return
            ended = endings

    def _new_job(self, job: str) -> NewJob:
        return NewJob(
            job_id=job,
            digest=hashlib.sha256(job.encode()).hexdigest(),
            spec=self._spec(job),
            priority=Priority.NORMAL,
            tenant="tenant",
            seed=SAMPLING.seed,
            prompt_tokens=PROMPT_TOKENS,
            timeout_ms=600_000,
            router="router-1a2b3c4d",
        )

    def _spec(self, job: str) -> bytes:
        spec = JobSpec(job, self._tokens(PROMPT_TOKENS), SAMPLING, tenant="tenant")
        return job_spec_to_proto(spec).SerializeToString()

    def _canvas(self, index: int) -> bytes:
        tokens = self._tokens(self._shape.canvas_tokens)
        text = "x" * (self._shape.text_per_token * len(tokens))
        canvas = Canvas(index, tokens, tokens, text, denoising_steps=STEPS_PER_CANVAS, mean_entropy=0.001)
        return canvas_to_proto(canvas).SerializeToString()

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._shape.vocab_size) for _ in range(count))

    async def _used_bytes(self) -> int:
        # Connections hold buffers as large as what went through them.
        await self._redis.connection_pool.disconnect()
        await asyncio.sleep(CLOSED_S)
        memory: dict[str, Any] = await self._redis.info("memory")
        return int(memory["used_memory"] - memory["mem_aof_buffer"])

    async def _left(self) -> int:
        """Keys and index entries of the measured jobs."""
        named = [key async for key in self._redis.scan_iter(f"{self._keys.base}:*:job-*")]
        indexed = [job async for job, _ in self._redis.zscan_iter(f"{self._keys.base}:jobs", match="job-*")]
        return len(named) + len(indexed)


def replica(slots: int) -> ReplicaHello:
    """The one replica; its slots open the way out of the queue."""
    return ReplicaHello("replica-1a2b3c4d", "127.0.0.1:50051", "model", "v" * 64, slots)


async def each(calls: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Make the calls, a few at once."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(call: Coroutine[Any, Any, object]) -> None:
        async with limit:
            await call

    await asyncio.gather(*(one(call) for call in calls))


def measure(shape: Shape) -> MemoryFigures:
    """Run one shape against a server of its own."""
    with tempfile.TemporaryDirectory(prefix="easel-memory-") as folder:
        server = RedisServer(folder)
        server.start()
        try:
            return asyncio.run(Bench(shape, server.url).run())
        finally:
            server.stop()


def main() -> None:
    """Measure both shapes and print them."""
    print(f"{JOBS} jobs: {PROMPT_TOKENS} prompt tokens, {CANVASES} canvases, retention {RETENTION_S} s", flush=True)
    figures = {}
    for shape in SHAPES:
        figures[shape.name] = asdict(measure(shape))
        print(f"{shape.name}: canvases of {shape.canvas_tokens} tokens", flush=True)
        for name, value in figures[shape.name].items():
            print(f"  {name:<18} {value:12,.0f}", flush=True)
    print(json.dumps({name: {key: round(value) for key, value in rows.items()} for name, rows in figures.items()}))


if __name__ == "__main__":
    main()
