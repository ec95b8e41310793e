"""The product as a user runs it: the command, a real local Ray cluster, and clients in other processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from cluster.chaos.processes import Role, members
from cluster.client import Committed, EaselClient, Finished, RequestOptions
from cluster.embedded import LocalCluster, session_of
from cluster.redis_server import free_port

ROOT = Path(__file__).resolve().parents[2]
UP_TIMEOUT_S = 200.0
# The exact forms that the demo checkpoint promises.
PROMISED = {
    "reverse 40718": "81704",
    "sort 40718": "01478",
    "upper amber tile": "AMBER TILE",
    "add 27 58": "85",
    "count 31 to 34": "31 32 33 34",
    "Order 4821 from Acme Tools ships to Oslo on 2024-05-17.": (
        '{"order":4821,"name":"Acme Tools","city":"Oslo","date":"2024-05-17"}'
    ),
}


@dataclass(frozen=True)
class Command:
    """Runs `easel` with its state in a folder of its own."""

    home: Path

    def __call__(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*words),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=self.home,
        )

    def json(self, *words: str) -> dict[str, Any]:
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    @staticmethod
    def line(*words: str) -> list[str]:
        return [sys.executable, "-m", "cluster.cli", *words]

    def environment(self) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "EASEL_ADDRESS"}
        return kept | {"EASEL_HOME": str(self.home)}

    def record(self) -> dict[str, Any]:
        written: dict[str, Any] = json.loads((self.home / "local.json").read_text())
        return written


class LongAnswer(NamedTuple):
    """The canvases a reader got, in the order it got them, and how many runs they took."""

    indices: tuple[int, ...]
    tokens: tuple[int, ...]
    attempts: int


def wait_until_gone(leader: int, redis_pid: int, timeout_s: float = 15.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if not session_of(leader) and not _runs(redis_pid):
            return
        time.sleep(0.1)
    names = [process.name() for process in session_of(leader)]
    pytest.fail(f"still running: {names}, redis: {_runs(redis_pid)}")


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def easel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A running cluster: two routers and two replicas of the demo checkpoint."""
    command = Command(tmp_path_factory.mktemp("home"))
    up = command("up", "--port", str(free_port()), "--routers", "2", timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr + up.stdout
    yield command
    down = command("down", timeout_s=120)
    assert down.returncode == 0, down.stderr


@pytest.mark.parametrize("prompt", PROMISED)
def test_the_command_answers_the_promised_forms(easel: Command, prompt: str) -> None:
    answer = easel.json("generate", prompt, "--seed", "1")
    assert answer["text"] == PROMISED[prompt]
    assert answer["finish_reason"] == "eos"
    assert {"job_id", "usage", "replica", "seed"} <= set(answer)


def test_the_same_seed_gives_the_same_tokens_on_both_replicas(easel: Command) -> None:
    words = ("generate", "count 31 to 41", "--seed", "5", "--max-denoising-steps", "3")
    assert len({easel.json(*words)["text"] for _ in range(4)}) == 1


def test_a_submitted_job_is_read_by_later_commands(easel: Command) -> None:
    job_id = easel("submit", "sort 40718").stdout.split()[-1]
    watched = easel("watch", job_id)
    assert "01478" in watched.stdout
    assert easel.json("get", job_id)["state"] == "succeeded"
    assert job_id in easel("jobs", "--json").stdout


def test_the_demo_answers_its_eight_prompts_right(easel: Command) -> None:
    demo = easel("demo", timeout_s=120)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "8 of 8 answers right" in demo.stdout
    assert "2 replicas served" in demo.stdout


def test_status_shows_two_replicas_and_their_slots(easel: Command) -> None:
    status = easel.json("status")
    assert (len(status["replicas"]), status["slots"]) == (2, 16)


def test_a_second_up_is_refused_in_one_line(easel: Command) -> None:
    second = easel("up")
    assert second.returncode != 0
    assert "already runs" in second.stderr
    assert "easel down" in second.stderr
    assert "Traceback" not in second.stderr


def long_answers(address: str, count: int, *, while_running: Callable[[], None] = lambda: None) -> list[LongAnswer]:
    """Answers of 36 denoising steps and more, streamed at once by a client that looks after itself."""

    async def one(client: EaselClient, seed: int) -> LongAnswer:
        indices: list[int] = []
        tokens: list[int] = []
        attempts = 0
        options: RequestOptions = {
            "seed": seed,
            "confidence_threshold": 1e-6,
            "max_denoising_steps": 48,
            "max_new_tokens": 96,
        }
        async for event in client.stream(tokens=list(range(5, 25)), **options):
            if isinstance(event, Committed):
                indices.append(event.canvas_index)
                tokens.extend(event.token_ids)
            elif isinstance(event, Finished):
                attempts = event.usage.attempts
        return LongAnswer(tuple(indices), tuple(tokens), attempts)

    async def ask() -> list[LongAnswer]:
        async with EaselClient(address) as client:
            asking = asyncio.gather(*(one(client, seed) for seed in range(count)))
            await asyncio.to_thread(while_running)
            return await asking

    return asyncio.run(ask())


def redeployed_settings(record: dict[str, Any], file: Path) -> Path:
    """Settings of the cluster as it runs but for the log level: Serve replaces every replica, a few at a time."""
    settings = {
        "checkpoint": record["checkpoint"],
        "log_level": "WARNING",
        "state": {"url": record["redis_url"]},
        "router": {"port": int(record["address"].rpartition(":")[2]), "replicas": 2},
        "denoiser": {"replicas": 2},
    }
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def test_a_redeploy_of_everything_costs_no_reader_a_token(easel: Command) -> None:
    address = easel.record()["address"]
    expected = [answer[:2] for answer in long_answers(address, 4)]
    before = easel.json("status")
    settings = redeployed_settings(easel.record(), easel.home / "redeploy.yaml")
    redeploy = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.deploy", easel.record()["ray_address"], str(settings)],
        env={**easel.environment(), "RAY_AUTH_MODE": "token"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    rounds = attempts = 0
    with redeploy:
        while redeploy.poll() is None:
            answers = long_answers(address, 4)
            assert [answer[:2] for answer in answers] == expected
            attempts += sum(answer.attempts for answer in answers)
            rounds += 1
        assert redeploy.returncode == 0, redeploy.stderr and redeploy.stderr.read()
    after = easel.json("status")
    for kind in ("replicas", "routers"):
        names = [{str(row) if kind == "routers" else row["replica"] for row in view[kind]} for view in (before, after)]
        assert not names[0] & names[1], f"{kind} were not replaced"
    assert rounds > 1
    assert attempts >= 4 * rounds


def test_a_drained_replica_makes_room_for_a_fresh_one(easel: Command) -> None:
    replica = easel.json("status")["replicas"][0]["replica"]
    drained = easel("drain", replica, timeout_s=90)
    assert drained.returncode == 0, drained.stderr
    assert replica in drained.stdout
    assert easel("drain", "denoiser-nobody").returncode != 0
    wait_for_replicas(easel, without=replica)


def wait_for_replicas(easel: Command, *, without: str, timeout_s: float = 60.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    names: set[str] = set()
    while time.monotonic() < give_up_s:
        names = {row["replica"] for row in easel.json("status")["replicas"]}
        if len(names) == 2 and without not in names:
            return
        time.sleep(0.5)
    pytest.fail(f"no second replica came back: {names}")


def test_a_killed_replica_is_replaced_and_its_readers_get_every_token_once(easel: Command) -> None:
    address = easel.record()["address"]
    expected = [answer[:2] for answer in long_answers(address, 4)]
    before = {row["replica"] for row in easel.json("status")["replicas"]}
    cluster = LocalCluster(**easel.record())
    victim = next(member.process for member in members(cluster) if member.role is Role.DENOISER)

    def kill() -> None:
        time.sleep(0.1)
        victim.send_signal(signal.SIGKILL)

    assert [answer[:2] for answer in long_answers(address, 4, while_running=kill)] == expected
    assert easel.json("generate", "sort 40718", "--seed", "1")["text"] == "01478"
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        now = {row["replica"] for row in easel.json("status")["replicas"]}
        if len(now) == 2 and now != before:
            return
        time.sleep(0.5)
    pytest.fail(f"no second replica came back: {now}")


def test_down_leaves_no_process_and_says_so_twice(tmp_path: Path) -> None:
    command = Command(tmp_path)
    up = command("up", "--port", str(free_port()), "--replicas", "1", "--engine", "fake", timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr
    record = command.record()
    assert command("down", timeout_s=120).returncode == 0
    wait_until_gone(record["pid"], record["redis_pid"])
    assert "no cluster runs" in command("down").stdout + command("down").stderr


def test_ctrl_c_in_the_foreground_leaves_no_process(tmp_path: Path) -> None:
    command = Command(tmp_path)
    line = command.line("up", "--foreground", "--port", str(free_port()), "--replicas", "1", "--engine", "fake")
    with subprocess.Popen(line, env=command.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for said in process.stdout:
            if "is up" in said:
                break
        record = command.record()
        process.send_signal(signal.SIGINT)
        process.wait(120)
    wait_until_gone(record["pid"], record["redis_pid"])


def test_a_killed_warden_leaves_nothing_after_down(tmp_path: Path) -> None:
    command = Command(tmp_path)
    up = command("up", "--port", str(free_port()), "--replicas", "1", "--engine", "fake", timeout_s=UP_TIMEOUT_S)
    assert up.returncode == 0, up.stderr
    record = command.record()
    os.kill(record["pid"], signal.SIGKILL)
    command("down", timeout_s=120)
    wait_until_gone(record["pid"], record["redis_pid"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--checkpoint", "/nowhere"), "no such folder"),
        (("--redis-url", "redis://127.0.0.1:1/0"), "cannot be reached"),
        (("--redis-url", "http://x"), "redis url"),
        (("--tp", "3"), "4 attention heads allow 1, 2, 4"),
        (("--replicas", "0"), "replicas"),
        (("--config", "/nowhere.yaml"), "cannot be read"),
        (("--port", "99999"), "port"),
    ],
)
def test_a_cluster_that_cannot_come_up_says_why_in_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = Command(tmp_path)("up", *words, timeout_s=UP_TIMEOUT_S)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "local.json").exists()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = Command(tmp_path)("up", "--port", str(port))
    assert done.returncode != 0
    assert f"port {port}" in done.stderr
