"""The demo command, with a cluster of one small router."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cluster import embedded
from cluster.cli import demo as demo_module
from cluster.cli.app import easel
from cluster.cli.demo import load_jobs, run_demo
from cluster.cli.demo_board import DemoJob, LiveBoard, summary_table, totals_line
from cluster.client import Committed, Draft, Finished
from cluster.core import FinishReason, Usage
from cluster.errors import StartupError
from tests.unit.commands import local_cluster
from tests.unit.fake_router import FakeRouter, serve


def console() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, width=140, markup=False), written


async def test_the_demo_runs_all_prompts_and_sums_up() -> None:
    jobs = [DemoJob(number, word, word[::-1]) for number, word in enumerate(("abc", "hello"), 1)]
    screen, written = console()
    async with serve(FakeRouter()) as address:
        assert await run_demo(address, jobs, screen)
    shown = written.getvalue()
    assert "[1] finished on r0: cba" in shown
    assert "[2] canvas 1 is final: ol" in shown
    assert "2 of 2 answers right · 12 tokens in 14 steps" in shown
    assert "1 replica served" in shown


async def test_a_wrong_answer_shows_what_was_expected_and_fails_the_demo() -> None:
    jobs = [DemoJob(1, "abc", "xyz"), DemoJob(2, "!cancelled", "y")]
    screen, written = console()
    async with serve(FakeRouter()) as address:
        assert not await run_demo(address, jobs, screen)
    assert "expected xyz" in written.getvalue()
    assert "[2] failed: job x was cancelled" in written.getvalue()
    assert "0 of 2 answers right" in written.getvalue()


def test_the_board_shows_every_job_in_its_row() -> None:
    jobs = [DemoJob(1, "first", "ab"), DemoJob(2, "second", "zz")]
    jobs[0].canvas.apply(Draft(0, 3, "a?", 0.25, 1, "r1"))
    jobs[1].canvas.apply(Committed(0, "ab", (97, 98), 5, 0.1))
    jobs[1].canvas.apply(Finished(FinishReason.EOS, Usage(1, 2, 1, 5), "r0"))
    screen = Console(file=io.StringIO(), width=120, force_terminal=True)
    with LiveBoard(screen, jobs) as board:
        board.changed(jobs[0])
    shown = screen.file
    assert isinstance(shown, io.StringIO)
    assert "0:3" in shown.getvalue()
    assert "0.250" in shown.getvalue()
    assert "✗" in shown.getvalue()
    assert totals_line(jobs, 2.0) == (
        "0 of 2 answers right · 2 tokens in 5 steps and 2.00 s · 1 tokens/s · 1 replica served"
    )
    assert summary_table(jobs).row_count == 2


def test_a_missing_or_odd_prompt_file_is_an_error_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="run the demo from a clone"):
        load_jobs(tmp_path / "none.json")
    odd = tmp_path / "odd.json"
    odd.write_text('[{"prompt": 1}]')
    with pytest.raises(StartupError, match="must be a list of"):
        load_jobs(odd)


@pytest.mark.parametrize("runs_already", [True, False])
def test_the_demo_takes_down_only_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs_already: bool
) -> None:
    calls: list[str] = []
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": "abc", "answer": "cba"}]))
    cluster = local_cluster("127.0.0.1:9000")

    async def run(address: str, jobs: list[DemoJob], screen: Console) -> bool:
        calls.append(address)
        return False

    def up(options: embedded.UpOptions, report: embedded.Report) -> embedded.LocalCluster:
        calls.append("up")
        return cluster

    monkeypatch.setattr(demo_module, "PROMPTS", prompts)
    monkeypatch.setattr(demo_module, "run_demo", run)
    monkeypatch.setattr(embedded, "current", lambda: cluster if runs_already else None)
    monkeypatch.setattr(embedded, "up", up)
    monkeypatch.setattr(embedded, "down", lambda report: calls.append("down"))
    result = CliRunner().invoke(easel, ["demo"])
    assert result.exit_code == 1
    assert calls == (["127.0.0.1:9000"] if runs_already else ["up", "127.0.0.1:9000", "down"])
