"""SIGTERM to a replica's process, on a real local Ray cluster: its jobs go on elsewhere from where they were."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from cluster.chaos.processes import Role, members
from cluster.client import EaselClient
from cluster.embedded import LocalCluster
from cluster.redis_server import free_port
from tests.e2e.conftest import until
from tests.e2e.test_cluster import UP_TIMEOUT_S, Command

SETTINGS = {"denoiser": {"engine": "fake", "slots": 1, "fake_step_ms": 50, "fake_steps_per_canvas": 40}}


@pytest.fixture(scope="module")
def easel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Two replicas with one slot each, and jobs of a few seconds."""
    home = tmp_path_factory.mktemp("home")
    command = Command(home)
    (home / "easel.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML
    words = ("--config", str(home / "easel.yaml"), "--port", str(free_port()), "--replicas", "2")
    up = command("up", *words, timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr + up.stdout
    yield command
    down = command("down", timeout_s=120)
    assert down.returncode == 0, down.stderr


def process_of(role: Role, record: dict[str, Any]) -> psutil.Process:
    return next(member.process for member in members(LocalCluster(**record)) if member.role is role)


async def test_a_replica_that_gets_sigterm_gives_its_job_back(easel: Command) -> None:
    record = easel.record()
    async with EaselClient(record["address"]) as client:
        ids = [(await client.submit(tokens=[2, 3], seed=seed, max_new_tokens=64)).job_id for seed in range(2)]

        async def both_run() -> bool:
            rows = (await client.status()).replicas
            return len(rows) == 2 and all(row.stats.get("canvas_steps", 0) >= 5 for row in rows)

        await until(both_run)
        victim = process_of(Role.DENOISER, record)
        victim.send_signal(signal.SIGTERM)

        async def both_are_done() -> bool:
            return all([(await client.get(job_id)).state == "succeeded" for job_id in ids])

        await until(both_are_done, timeout_s=60.0)
        jobs = [await client.get(job_id) for job_id in ids]
        assert sorted([attempt.reason for attempt in job.history] for job in jobs) == [[], ["DRAINED"]]
        assert [job.usage.denoising_steps for job in jobs] == [80, 80]
        await until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)


async def test_a_router_that_gets_sigterm_hands_its_jobs_over(easel: Command) -> None:
    record = easel.record()
    async with EaselClient(record["address"]) as client:
        job_id = (await client.submit(tokens=[2, 3], seed=1, max_new_tokens=64)).job_id

        async def it_runs() -> bool:
            return (await client.get(job_id)).state == "running"

        await until(it_runs)
        process_of(Role.ROUTER, record).send_signal(signal.SIGTERM)

        async def it_is_done() -> bool:
            return (await client.get(job_id)).state == "succeeded"

        await until(it_is_done, timeout_s=60.0)
        assert (await client.get(job_id)).usage.denoising_steps == 80
