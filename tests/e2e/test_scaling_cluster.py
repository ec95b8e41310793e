"""Autoscaling on a real local Ray cluster: a burst brings replicas, its end takes them away, and no job is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from cluster.checkpoint import read_checkpoint
from cluster.client import EaselClient, JobView
from cluster.redis_server import free_port
from deployments.engine.fake import FakeEngine
from tests.e2e.conftest import CHECKPOINT, until
from tests.e2e.test_cluster import UP_TIMEOUT_S, Command

PROMPT = (2, 3)
SHORT_CANVASES, LONG_CANVASES = 6, 10
# A canvas takes half a second, however many are denoised beside it; a replica has room for eight.
SETTINGS: Mapping[str, Any] = {
    "denoiser": {
        "engine": "fake",
        "slots": 8,
        "fake_step_ms": 25,
        "fake_steps_per_canvas": 20,
        "autoscaling": {
            "min_replicas": 0,
            "max_replicas": 3,
            "target_wait_s": 2,
            "scale_down_after_s": 3,
            "idle_to_zero_after_s": 8,
            "start_s": 5,
        },
    },
    "router": {"autoscaling": {"max_replicas": 2}},
}


@pytest.fixture(scope="module")
def easel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A cluster without a replica."""
    home = tmp_path_factory.mktemp("home")
    command = Command(home)
    (home / "easel.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML
    up = command("up", "--config", str(home / "easel.yaml"), "--port", str(free_port()), timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr + up.stdout
    yield command
    down = command("down", timeout_s=120)
    assert down.returncode == 0, down.stderr


def expected_tokens(seed: int, canvases: int) -> tuple[int, ...]:
    engine = FakeEngine(read_checkpoint(CHECKPOINT).card)
    return tuple(token for index in range(canvases) for token in engine.answer_canvas(PROMPT, seed, index))


async def submit(client: EaselClient, seed: int, canvases: int) -> str:
    tokens = canvases * read_checkpoint(CHECKPOINT).card.canvas_tokens
    return (await client.submit(tokens=list(PROMPT), seed=seed, max_new_tokens=tokens)).job_id


async def replicas(client: EaselClient) -> int:
    return len((await client.status()).replicas)


async def there_are(client: EaselClient, number: int) -> bool:
    return await replicas(client) == number


async def jobs_until_one_goes(client: EaselClient) -> list[str]:
    """Three jobs at a time, which are spread over three replicas, until one of these goes from under its job."""
    job_ids: list[str] = []
    async with asyncio.timeout(60.0):
        while len((status := await client.status()).replicas) == 3:
            if status.active + status.queued < 3:
                job_ids.append(await submit(client, len(job_ids), LONG_CANVASES))
            await asyncio.sleep(0.02)
    return job_ids


async def ended(client: EaselClient, job_ids: list[str]) -> list[JobView]:
    async def all_ended() -> bool:
        return all([(await client.get(job_id)).state not in {"queued", "running"} for job_id in job_ids])

    await until(all_ended, timeout_s=60.0)
    return [await client.get(job_id) for job_id in job_ids]


async def test_a_burst_brings_replicas_from_none_and_its_end_takes_them_away_and_no_job_is_lost(easel: Command) -> None:
    async with EaselClient(easel.record()["address"]) as client:
        assert await replicas(client) == 0
        assert "0 replicas of 0..3" in easel("status").stdout
        first = await submit(client, 100, 1)
        assert [job.state for job in await ended(client, [first])] == ["succeeded"]
        assert await replicas(client) == 1

        burst = [await submit(client, seed, SHORT_CANVASES) for seed in range(48)]

        await until(lambda: there_are(client, 3), timeout_s=60.0)
        long = await jobs_until_one_goes(client)
        jobs = await ended(client, burst + long)
        assert {(job.state, job.losses) for job in jobs} == {("succeeded", 0)}
        asked = [SHORT_CANVASES] * len(burst) + [LONG_CANVASES] * len(long)
        for job, canvases in zip(jobs, asked, strict=True):
            assert job.token_ids == expected_tokens(job.seed, canvases)
        # A replica that goes gives its jobs back with what is done of them: no denoising step is made twice.
        assert [job.usage.denoising_steps for job in jobs] == [20 * canvases for canvases in asked]
        assert {attempt.reason for job in jobs for attempt in job.history} == {"DRAINED"}

        await until(lambda: there_are(client, 1), timeout_s=60.0)
        await until(lambda: there_are(client, 0), timeout_s=60.0)
