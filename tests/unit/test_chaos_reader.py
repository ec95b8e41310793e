"""The clients of a chaos run against one small router: each style, and calls that break."""

from __future__ import annotations

from functools import partial

import pytest

from cluster.chaos import reader as reader_module
from cluster.chaos.jobs import ChaosJob, Style
from cluster.chaos.reader import Reader
from cluster.chaos.transcript import Transcript
from cluster.chaos.verdict import Ending, judge
from cluster.client import EaselClient
from tests.unit.fake_router import FakeRouter, serve

PROMPT = "hello!"
TOKENS = tuple(ord(character) for character in PROMPT[::-1])
STAYING = [style for style in Style if not style.stops_early]


def job(style: Style, prompt: str = PROMPT, *, leaves_after_events: int = 3) -> ChaosJob:
    return ChaosJob(0, prompt, {"seed": 7}, style, leaves_after_events, away_ms=1)


async def read(router: FakeRouter, wanted: ChaosJob) -> Transcript:
    async with serve(router) as address:
        return await Reader(address, wanted, "job-1").read()


async def read_calmly() -> Transcript:
    async with serve(FakeRouter()) as address:
        return await Reader(address, job(Style.GENERATE), "job-1").read_plainly()


@pytest.mark.parametrize("style", STAYING)
async def test_every_style_gets_the_whole_answer_once(style: Style) -> None:
    notes = await read(FakeRouter(), job(style))
    assert not judge(await read_calmly(), notes, Ending("succeeded", TOKENS)).lines()
    assert notes.finished
    assert notes.broken_calls == []


async def test_a_client_that_reconnects_asks_for_the_next_canvas_only() -> None:
    router = FakeRouter()
    notes = await read(router, job(Style.RECONNECT))
    assert router.calls == ["Submit", "Watch 0", "Watch 1"]
    assert [canvas.index for canvas in notes.canvases] == [0, 1]


async def test_a_client_that_rejoins_makes_the_same_request_again() -> None:
    router = FakeRouter()
    notes = await read(router, job(Style.REJOIN))
    assert router.calls == ["Submit", "Watch 0", "StreamGenerate"]
    assert [canvas.index for canvas in notes.canvases] == [0, 0, 1]
    assert list(router.parsed) == ["job-1"]


async def test_a_client_that_cancels_does_so_in_the_middle() -> None:
    router = FakeRouter()
    notes = await read(router, job(Style.CANCEL))
    assert router.cancelled == ["job-1"]
    assert notes.asked_to_stop


async def test_a_client_that_leaves_closes_its_stream() -> None:
    notes = await read(FakeRouter(), job(Style.LEAVE))
    assert notes.asked_to_stop
    assert not notes.finished
    assert len(notes.canvases) == 1


@pytest.mark.parametrize("style", [Style.CANCEL, Style.LEAVE])
async def test_a_job_that_ends_before_its_client_stops_it_is_as_any_other(style: Style) -> None:
    notes = await read(FakeRouter(), job(style, leaves_after_events=99))
    assert notes.finished
    assert not notes.asked_to_stop


@pytest.mark.parametrize("style", [Style.STREAM, Style.GENERATE, Style.WATCH])
async def test_a_call_that_the_client_gives_up_is_counted_and_made_again(
    style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_REPEAT_S", 0.01)
    monkeypatch.setattr(reader_module, "EaselClient", partial(EaselClient, patience_s=0))
    router = FakeRouter()
    router.unavailable_calls = 6
    notes = await read(router, job(style))
    assert notes.broken_calls == ["Unavailable: the router starts"]
    assert not judge(await read_calmly(), notes, Ending("succeeded", TOKENS)).lines()


@pytest.mark.parametrize("style", [Style.STREAM, Style.GENERATE, Style.WATCH])
async def test_a_job_that_was_cancelled_by_somebody_else_is_a_problem_and_is_not_repeated(style: Style) -> None:
    notes = await read(FakeRouter(), job(style, "!cancelled"))
    assert notes.problem == "JobCancelled: job x was cancelled"
    assert not notes.finished
    assert not notes.asked_to_stop


async def test_a_reader_gives_up_on_a_job_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PATIENCE_S", 0.3)
    notes = await read(FakeRouter(), job(Style.STREAM, "!hang"))
    assert notes.problem is not None
    assert "gave up" in notes.problem
