"""What counting costs: commits to a real Redis through a store that records into Ray, over the plain store.

Both commit the same canvases in turns in this run. A commit is what is counted most often, but for steps.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.config import parse_settings
from cluster.core import Priority
from cluster.jobs.connection import connect
from cluster.jobs.measured import MeasuredJobStore
from cluster.jobs.records import NewJob, ReplicaHello
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from cluster.telemetry import metrics
from deployments.ray_metrics import RayRecorder

CANVAS = bytes(1500)
COMMITS = 300
ROUNDS = 12
RECORDS = 20_000


@dataclass(frozen=True)
class TelemetryFigures:
    """CPU time of this process per commit, recorded over plain (median), and one record of each kind, microseconds."""

    recorded_over_plain_commit_cpu: float
    plain_commit_cpu_us: float
    counter_us: float
    gauge_us: float
    histogram_us: float


def measure_telemetry() -> TelemetryFigures:
    """Start Ray and a Redis, and stop them."""
    with tempfile.TemporaryDirectory(prefix="easel-ray-") as folder:
        ray.init(
            num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder, logging_level=logging.ERROR
        )
        try:
            recorder = RayRecorder()
            ratio, plain_us = asyncio.run(_commit_ratio(recorder, Path(folder)))
            return TelemetryFigures(
                recorded_over_plain_commit_cpu=ratio,
                plain_commit_cpu_us=plain_us,
                counter_us=_each_us(lambda: recorder.add(metrics.COMMITS)),
                gauge_us=_each_us(lambda: recorder.set(metrics.ROUTERS, 1)),
                histogram_us=_each_us(lambda: recorder.observe(metrics.STEPS_PER_CANVAS, 20)),
            )
        finally:
            ray.shutdown()


async def _commit_ratio(recorder: RayRecorder, folder: Path) -> tuple[float, float]:
    server = RedisServer(folder / "redis")
    server.start()
    state = parse_settings({"checkpoint": "", "state": {"url": server.url}}).state
    plain = JobStore.of(connect(server.url), state)
    recorded = MeasuredJobStore.recording(recorder, connect(server.url), state)
    try:
        await plain.ping()
        rounds = [await _round(plain, recorded, number) for number in range(ROUNDS)]
        ratio = statistics.median(recorded_us / plain_us for plain_us, recorded_us in rounds)
        return ratio, statistics.median(plain_us for plain_us, _ in rounds)
    finally:
        await plain.close()
        await recorded.close()
        server.stop()


async def _round(plain: JobStore, recorded: JobStore, number: int) -> tuple[float, float]:
    """Microseconds a commit of each. One job each; commits in turns, so that both meet the same machine."""
    await plain.heartbeat_replica(ReplicaHello("r", "127.0.0.1:1", "m", "v", slots=2 * ROUNDS))
    jobs = [(store, *await _started(store, f"job-{number}-{side}")) for side, store in enumerate((plain, recorded))]
    took_s = [0.0, 0.0]
    for index in range(COMMITS):
        for side, (store, job_id, epoch) in enumerate(jobs):
            began_s = time.process_time()
            await store.commit(job_id, epoch, index, CANVAS, tokens=256, denoising_steps=20)
            took_s[side] += time.process_time() - began_s
    plain_us, recorded_us = (total_s / COMMITS * 1e6 for total_s in took_s)
    return plain_us, recorded_us


async def _started(store: JobStore, job_id: str) -> tuple[str, int]:
    _, placement = await store.submit(NewJob(job_id, "d", b"", Priority.NORMAL, "", 1, 3, None, "router"))
    assert placement is not None
    return job_id, placement.epoch


def _each_us(record: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    for _ in range(RECORDS):
        record()
    return (time.perf_counter() - began_s) / RECORDS * 1e6


if __name__ == "__main__":
    print(json.dumps(measure_telemetry().__dict__))
