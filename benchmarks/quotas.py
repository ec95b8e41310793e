"""What quotas cost Redis: time in the scripts per job, with a quota on running canvases over without any.

    python -m benchmarks.quotas

A real redis-server; jobs are submitted, placed and finished one after another, the two kinds in turns, so that
the machine's moods befall both. Time is what Redis counts for EVALSHA. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from typing import cast

from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.jobs.connection import connect
from cluster.jobs.records import NewJob, ReplicaHello
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer

ROUNDS = 12
JOBS = 400
LEASE_MS = 600_000


async def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(folder)
        server.start()
        try:
            client = connect(server.url)
            free = await _opened(client, "free", {})
            bounded = await _opened(client, "bounded", {"": "100 1000 - -"})
            pairs = [(await _job_us(client, free, n), await _job_us(client, bounded, n)) for n in range(ROUNDS)]
            await client.aclose()
        finally:
            server.stop()
    without_us = statistics.median(pair[0] for pair in pairs)
    ratio = statistics.median(with_us / free_us for free_us, with_us in pairs)
    print(f"{without_us:.1f} us in scripts per job without quotas; with them, {ratio:.2f} of it")
    print(json.dumps({"script_us_per_job": round(without_us, 1), "quotas_on_over_off": round(ratio, 3)}))


async def _opened(client: Redis, namespace: str, rows: dict[str, str]) -> JobStore:
    store = JobStore(client, namespace=namespace, lease_ms=LEASE_MS, retention_s=1)
    await store.ping()
    if rows:
        await store.set_quotas(rows)
    await store.heartbeat_replica(ReplicaHello("replica", "host:1", "model", "v1", 8))
    return store


async def _job_us(client: Redis, store: JobStore, number: int) -> float:
    before_us = await _script_us(client)
    for job in range(JOBS):
        await _run(store, f"job-{number}-{job}")
    return (await _script_us(client) - before_us) / JOBS


async def _run(store: JobStore, job_id: str) -> None:
    job = NewJob(job_id, "digest", b"spec", Priority.NORMAL, "tenant", 1, 7, None, "router")
    _, placement = await store.submit(job)
    if placement is None:
        raise RuntimeError(f"{job_id} found no slot")
    finish = FinishReason.LENGTH
    await store.commit(job_id, placement.epoch, 0, b"canvas", tokens=1, denoising_steps=1, finish=finish)


async def _script_us(client: Redis) -> int:
    stats = cast("dict[str, dict[str, int]]", await client.info("commandstats"))
    return stats.get("cmdstat_evalsha", {"usec": 0})["usec"]


if __name__ == "__main__":
    asyncio.run(main())
