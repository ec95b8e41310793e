"""Replicas of two ranks under Ray: the command, real processes, and what happens when a rank dies or hangs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.chaos.processes import Role, members
from cluster.embedded import LocalCluster
from cluster.redis_server import free_port
from tests.e2e.conftest import CHECKPOINT
from tests.e2e.test_cluster import UP_TIMEOUT_S, Command, long_answers, wait_until_gone

READERS = 4
REPLACED_S = 90.0
# Small, so that a hung rank is found while the test waits; loading is not bound by it.
SETTINGS = {"denoiser": {"replicas": 2, "tp": 2, "step_timeout_s": 3.0}}
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def easel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Two replicas of two ranks each; nothing of them is left at the end."""
    home = tmp_path_factory.mktemp("home")
    command = Command(home)
    up = command("up", "--config", settings_file(home, SETTINGS), "--port", str(free_port()), timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr + up.stdout
    record = command.record()
    yield command
    assert command("down", timeout_s=120).returncode == 0
    wait_until_gone(record["pid"], record["redis_pid"])


@pytest.fixture(scope="module")
def expected() -> Tokens:
    """What `long_answers` must give, from an engine of one rank in this process."""
    from deployments.engine.api import EngineJob
    from deployments.engine.torch_tp.engine import load_engine

    engine = load_engine(CHECKPOINT, device="cpu")
    sampling = replace(engine.card.defaults, confidence_threshold=1e-6, max_denoising_steps=48, max_new_tokens=96)
    for seed in range(READERS):
        engine.start(EngineJob(str(seed), tuple(range(5, 25)), replace(sampling, seed=seed)))
    answers: list[list[int]] = [[] for _ in range(READERS)]
    while engine.stats().active_jobs:
        for commit in engine.step().commits:
            answers[int(commit.job_id)].extend(commit.tokens)
    return [_until_eos(answer, engine.card.eos_token_ids) for answer in answers]


def test_the_demo_prompts_are_answered_right_by_two_ranks(easel: Command) -> None:
    demo = easel("demo", timeout_s=120)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "8 of 8 answers right" in demo.stdout
    assert "2 replicas served" in demo.stdout
    assert [row["stats"]["ranks"] for row in easel.json("status")["replicas"]] == [2, 2]


def test_two_ranks_give_the_tokens_of_one(easel: Command, expected: Tokens) -> None:
    assert tokens_of(easel) == expected


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_costs_no_reader_a_token(
    easel: Command, expected: Tokens, how: signal.Signals
) -> None:
    before, victim = replicas(easel), processes(easel, Role.RANK)[0]

    def strike() -> None:
        time.sleep(0.2)
        victim.send_signal(how)

    assert tokens_of(easel, while_running=strike) == expected
    until_replaced(easel, before, victim)
    assert tokens_of(easel) == expected


@pytest.mark.slow
def test_a_rank_that_dies_while_nothing_runs_has_its_replica_replaced(easel: Command, expected: Tokens) -> None:
    before, victim = replicas(easel), processes(easel, Role.RANK)[0]
    victim.kill()
    until_replaced(easel, before, victim)
    assert tokens_of(easel) == expected


def test_a_killed_replica_takes_its_ranks_along(easel: Command) -> None:
    before, victim = replicas(easel), processes(easel, Role.DENOISER)[0]
    ranks = processes(easel, Role.RANK)
    victim.kill()
    until_replaced(easel, before, victim)
    assert len(set(ranks) - set(processes(easel, Role.RANK))) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tp": 3}, "the tensor-parallel degree is 3; the model's 4 attention heads allow 1, 2, 4"),
        ({"tp": 2, "engine": "fake"}, "denoiser.tp: 2 is not allowed"),
        ({"tp": 2, "replicas": 1, "placement": "strict_spread"}, "each on another node; the cluster has 1 node with"),
    ],
    ids=["a degree that does not divide", "an engine without ranks", "a placement that can never be met"],
)
def test_ranks_that_cannot_run_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    words = ("--config", settings_file(tmp_path, {"denoiser": settings}), "--port", str(free_port()))
    done = Command(tmp_path)("up", *words, timeout_s=UP_TIMEOUT_S)
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "local.json").exists()


def settings_file(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "easel.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


def tokens_of(easel: Command, while_running: Callable[[], None] = lambda: None) -> Tokens:
    answers = long_answers(easel.record()["address"], READERS, while_running=while_running)
    assert all(answer.indices == tuple(range(len(answer.indices))) for answer in answers)
    return [answer.tokens for answer in answers]


def replicas(easel: Command) -> set[str]:
    return {row["replica"] for row in easel.json("status")["replicas"]}


def processes(easel: Command, role: Role) -> list[psutil.Process]:
    return [member.process for member in members(LocalCluster(**easel.record())) if member.role is role]


def until_replaced(easel: Command, before: set[str], victim: psutil.Process) -> None:
    """Wait until two replicas serve, one of them new, and their four processes are all there is."""
    give_up_s = time.monotonic() + REPLACED_S
    while True:
        now = replicas(easel)
        counts = [len(processes(easel, role)) for role in (Role.DENOISER, Role.RANK)]
        if (len(now), len(now & before), counts) == (2, 1, [2, 2]) and not victim.is_running():
            return
        assert time.monotonic() < give_up_s, f"before {before}, now {now}; replicas, ranks: {counts}"
        time.sleep(0.5)


def _until_eos(answer: list[int], eos: tuple[int, ...]) -> tuple[int, ...]:
    end = next((place for place, token in enumerate(answer) if token in eos), len(answer))
    return tuple(answer[:end])
