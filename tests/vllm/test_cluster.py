"""`easel up --engine vllm`: real Ray, real vLLM, and the death of vLLM's engine process under its jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.chaos.processes import Role, members
from cluster.checkpoint import read_checkpoint
from cluster.client import Answer, EaselClient
from cluster.embedded import LocalCluster, session_of
from cluster.redis_server import free_port
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.engine import load_engine
from tests.e2e.conftest import until
from tests.e2e.test_cluster import UP_TIMEOUT_S, Command, wait_until_gone
from tests.e2e.test_tensor_parallel_cluster import settings_file
from tests.vllm.driving import changed_checkpoint, run_all, tokens_of, varied_jobs
from tests.vllm.test_failures import title_of

JOBS = 16
SLOTS = 8
RUN_WITHIN_S = 30.0
REPLACED_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a window so wide that vLLM and torch agree over several canvases."""
    return changed_checkpoint(tmp_path_factory.mktemp("model") / "wide", sliding_window=512)


@pytest.fixture(scope="module")
def easel(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Command]:
    """One replica on vLLM; nothing of it is left at the end."""
    home = tmp_path_factory.mktemp("home")
    settings = {"denoiser": {"replicas": 1, "slots": SLOTS, "vllm": {"enforce_eager": True}}}
    words = ("--config", settings_file(home, settings), "--checkpoint", str(checkpoint), "--port", str(free_port()))
    command = Command(home)
    up = command("up", "--engine", "vllm", *words, timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr + up.stdout
    record = command.record()
    yield command
    assert command("down", timeout_s=120).returncode == 0
    wait_until_gone(record["pid"], record["redis_pid"])


@pytest.fixture(scope="module")
def jobs(checkpoint: Path) -> list[EngineJob]:
    return varied_jobs(read_checkpoint(checkpoint).card, JOBS, canvases=4)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, jobs: list[EngineJob]) -> list[tuple[int, ...]]:
    """What `answers` must give, from the torch engine in this process."""
    engine = load_engine(checkpoint, device="cpu")
    commits = tokens_of(run_all(engine, jobs)[1])
    found = []
    for job in jobs:
        answer = [token for (name, _), canvas in sorted(commits.items()) if name == job.job_id for token in canvas]
        ends = [place for place, token in enumerate(answer) if token in engine.card.eos_token_ids]
        found.append(tuple(answer[: ends[0] if ends else len(answer)]))
    return found


def answers(easel: Command, jobs: Sequence[EngineJob], while_running: Callable[[], None] | None = None) -> list[Answer]:
    """Asks for all at once; `while_running` is called when the replica has its hands full."""

    async def one(client: EaselClient, job: EngineJob) -> Answer:
        options: Any = asdict(job.sampling)
        return await client.generate(tokens=job.prompt_tokens, **options)

    async def ask() -> list[Answer]:
        async with EaselClient(easel.record()["address"]) as client:
            asking = asyncio.gather(*(one(client, job) for job in jobs))
            if while_running is not None:
                await until(lambda: is_full(client), RUN_WITHIN_S)
                while_running()
            return await asking

    return asyncio.run(ask())


async def is_full(client: EaselClient) -> bool:
    return (await client.status()).active == SLOTS


def engine_process(easel: Command) -> psutil.Process:
    """vLLM's; waited for, because a replica that is being replaced has none."""
    end_s = time.monotonic() + REPLACED_S
    while time.monotonic() < end_s:
        found = [p for p in session_of(easel.record()["pid"]) if "EngineCore" in title_of(p)]
        if found:
            return found[0]
        time.sleep(0.5)
    pytest.fail("vllm has no engine process")


def denoiser(easel: Command) -> psutil.Process:
    cluster = LocalCluster(**easel.record())
    return next(member.process for member in members(cluster) if member.role is Role.DENOISER)


def test_vllm_answers_as_the_torch_engine(
    easel: Command, jobs: list[EngineJob], expected: list[tuple[int, ...]]
) -> None:
    assert [answer.token_ids for answer in answers(easel, jobs)] == expected


def test_jobs_outlive_vllms_engine_process(
    easel: Command, jobs: list[EngineJob], expected: list[tuple[int, ...]]
) -> None:
    core = engine_process(easel)
    given = answers(easel, jobs * 4, while_running=core.kill)
    assert [answer.token_ids for answer in given] == expected * 4
    # Some were finished by another replica than that which began them.
    assert max(answer.usage.attempts for answer in given) > 1
    assert engine_process(easel) != core


def test_vllms_processes_end_with_their_replica(easel: Command) -> None:
    core = engine_process(easel)
    below = [core, *core.children(recursive=True)]
    denoiser(easel).kill()
    _, alive = psutil.wait_procs(below, timeout=REPLACED_S)
    assert not alive
