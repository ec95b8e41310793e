"""What a chaos run says in the end, to people and to programs, and how it lets its jobs in."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from cluster import embedded
from cluster.chaos.board import Board
from cluster.chaos.crowd import GROUP_JOBS, Crowd, Gate, in_flight_at
from cluster.chaos.jobs import ChaosJob, draw_job
from cluster.chaos.options import ChaosOptions
from cluster.chaos.reader import names_of
from cluster.chaos.recovery import Kill, Recovery
from cluster.chaos.report import Report
from cluster.chaos.schedule import KillKind
from cluster.chaos.settling import Leak
from cluster.chaos.transcript import Transcript
from cluster.chaos.verdict import Ending, Verdict
from cluster.cli.app import easel
from cluster.config import parse_settings
from tests.unit.commands import local_cluster

REQUIRED = {
    "jobs", "kills", "lost", "duplicated", "different", "leaked", "attempts", "preemptions", "redone_steps",
    "kill_to_step_p50_ms", "kill_to_step_p99_ms", "seconds",
}  # fmt: skip


def report(verdict: Verdict | None = None, leak: Leak | None = None, left_over: int = 0) -> Report:
    return Report(
        seed=1,
        transcripts=[Transcript("job-1", broken_calls=["Unavailable: gone"])],
        endings=[Ending("succeeded", (1,), attempts=3, preemptions=1)],
        verdicts=[Verdict("job-1") if verdict is None else verdict],
        kills=[Kill(KillKind.REPLICA, 1.0, "r0", "r0"), Kill(KillKind.REDIS, 2.0, "redis")],
        skipped={KillKind.RANK: 2},
        recoveries=[Recovery(120.04, True), Recovery(900.0, False)],
        leak=Leak(0, 0, 0) if leak is None else leak,
        seconds=12.34,
        calm_seconds=3.2,
        left_over=left_over,
    )


def test_the_figures_are_those_that_programs_read() -> None:
    figures = json.loads(json.dumps(report().figures()))
    assert set(figures) >= REQUIRED
    assert figures["kills"] == {"replica": 1, "rank": 0, "router": 0, "redis": 1, "freeze": 0, "drain": 0}
    assert (figures["attempts"], figures["preemptions"], figures["broken_calls"]) == (3, 1, 1)
    assert (figures["kill_to_step_p50_ms"], figures["kill_to_step_p99_ms"]) == (120.0, 900.0)
    assert figures["kill_to_step_clean_max_ms"] == 120.0


def test_a_run_without_a_finding_passes() -> None:
    assert report().passed
    assert report().problems() == []


@pytest.mark.parametrize(
    "bad",
    [
        report(Verdict("job-1", lost=["it is failed", "ATTEMPTS_EXHAUSTED: no"])),
        report(Verdict("job-1", duplicated=["canvas 1 came twice or late, canvas 2 was next"])),
        report(Verdict("job-1", different=["canvas 1 differs"])),
        report(leak=Leak(slots=1, processes=0, missing=0)),
        report(leak=Leak(slots=0, processes=1, missing=0)),
        report(left_over=1),
    ],
)
def test_any_finding_fails_the_run_and_is_named(bad: Report) -> None:
    assert not bad.passed
    assert bad.problems()


def test_a_lost_job_counts_once_however_many_lines_tell_of_it() -> None:
    figures = report(Verdict("job-1", lost=["it is failed", "why", "and its history"])).figures()
    assert figures["lost"] == 1


def test_the_table_shows_kills_that_could_not_be_made() -> None:
    screen = Console(file=io.StringIO(), width=100)
    screen.print(report().table())
    written = screen.file
    assert isinstance(written, io.StringIO)
    assert "0 (2 skipped)" in written.getvalue()


def test_a_board_in_a_pipe_tells_phases_and_events_in_lines() -> None:
    written = io.StringIO()
    with Board(Console(file=written, width=100), live=False) as board:
        board.begin("disturbed", 2)
        board.say("killed r0")
        board.job_ended()
        board.job_ended()
    lines = written.getvalue().splitlines()
    assert lines[0] == "disturbed: 2 jobs"
    assert lines[1].endswith("s  killed r0")
    assert lines[-1].endswith("2 of 2 jobs have ended")


def test_the_cluster_to_start_has_the_shape_that_was_asked_for() -> None:
    settings = parse_settings(ChaosOptions(replicas=3, routers=4, slots=5).settings())
    assert (settings.denoiser.replicas, settings.router.replicas, settings.denoiser.slots) == (3, 4, 5)
    assert settings.router.port > 0


async def test_jobs_enter_with_the_strike_that_they_are_meant_for() -> None:
    gate = Gate(jobs=8, strikes=4)
    entered: list[int] = []

    async def enter(index: int) -> None:
        await gate.enter(index)
        entered.append(index)

    waiting = [asyncio.create_task(enter(index)) for index in range(8)]
    for strike, expected in enumerate((2, 4, 6, 8)):
        await gate.open_for(strike)
        await asyncio.sleep(0.01)
        assert len(entered) == expected
    await asyncio.gather(*waiting)


async def test_a_gate_without_strikes_is_open() -> None:
    gate = Gate(jobs=3, strikes=0)
    async with asyncio.timeout(1):
        await gate.enter(2)


async def test_the_crowd_keeps_its_bound_and_the_order_of_the_jobs() -> None:
    jobs = [draw_job(1, index) for index in range(30)]
    now = most = ended = 0

    async def read(job: ChaosJob) -> Transcript:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001 * (job.index % 3))
        now -= 1
        return Transcript(f"job-{job.index}")

    def count() -> None:
        nonlocal ended
        ended += 1

    transcripts = await Crowd(8, count).read_all(jobs, read)
    assert [notes.job_id for notes in transcripts] == [f"job-{index}" for index in range(30)]
    assert (most, ended) == (4, 30)


async def test_an_error_in_a_reader_ends_the_crowd_and_its_other_readers() -> None:
    cancelled: list[int] = []

    async def read(job: ChaosJob) -> Transcript:
        if job.index == 1:
            raise ValueError("a bug")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(job.index)
            raise
        return Transcript("never")

    with pytest.raises(ValueError, match="a bug"):
        await Crowd(4, lambda: None).read_all([draw_job(1, index) for index in range(2)], read)
    assert cancelled == [0]


def test_the_load_is_halved_in_every_second_group_of_jobs() -> None:
    assert [in_flight_at(index, 24) for index in (0, GROUP_JOBS - 1, GROUP_JOBS, 2 * GROUP_JOBS)] == [12, 12, 24, 12]
    assert in_flight_at(0, 1) == 1


def test_an_address_of_this_machine_has_two_names() -> None:
    assert names_of("127.0.0.1:8500") == ("127.0.0.1:8500", "localhost:8500")
    assert names_of("10.0.0.1:8500") == ("10.0.0.1:8500",)


def test_a_cluster_that_runs_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "current", lambda: local_cluster("127.0.0.1:1234"))
    done = CliRunner().invoke(easel, ["chaos"])
    assert done.exit_code == 1
    assert "a cluster runs here already, at 127.0.0.1:1234" in done.stderr
    assert "--use-running" in done.stderr


def test_a_running_cluster_must_run_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "current", lambda: None)
    done = CliRunner().invoke(easel, ["chaos", "--use-running"])
    assert done.exit_code == 1
    assert "no cluster runs on this machine" in done.stderr


@pytest.mark.parametrize(
    "words", [("--jobs", "0"), ("--seed", "-1"), ("--kill-every-s", "0"), ("--replicas", "0"), ("--in-flight", "x")]
)
def test_a_wrong_option_is_named_before_anything_starts(words: tuple[str, str]) -> None:
    done = CliRunner().invoke(easel, ["chaos", *words])
    assert done.exit_code == 2
    assert words[0] in done.stderr
