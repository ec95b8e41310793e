"""The thread that drives an engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

import pytest

from cluster.core import ModelCard, SamplingParams
from cluster.errors import EngineError
from deployments.engine.api import CanvasCheckpoint, EngineJob, StepReport
from deployments.engine.fake import FakeEngine
from deployments.step_loop import Checkpoints, StepLoop

SAMPLING = SamplingParams(1, 16, 8, 0.1, 0.4, 0.8, 0.005, 1)
CARD = ModelCard("fake", "v1", 128, 8, 256, 2, 0, (1,), SAMPLING)
BOUND_S = 10.0


class Reports:
    """Collects what the loop says, and lets a test wait for it."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.checkpoints: list[tuple[str, CanvasCheckpoint]] = []
        self.failures: list[EngineError] = []
        self._changed = threading.Condition()

    def step(self, report: StepReport, checkpoints: Checkpoints) -> None:
        with self._changed:
            self.steps.append(report)
            self.checkpoints.extend(checkpoints.items())
            self._changed.notify_all()

    def failed(self, failure: EngineError) -> None:
        with self._changed:
            self.failures.append(failure)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, BOUND_S)

    def steps_of(self, job_id: str) -> list[int]:
        return [made.step for report in self.steps for made in report.progress if made.job_id == job_id]

    def ended(self, job_id: str) -> bool:
        return any(commit.last and commit.job_id == job_id for report in self.steps for commit in report.commits)


class HangingEngine(FakeEngine):
    """Its second step begins, then waits until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__(CARD, slots=1, steps_per_canvas=1000)
        self.hangs = threading.Event()
        self.go_on = threading.Event()
        self.closed = False
        self.calls_after: list[str] = []

    def step(self) -> StepReport:
        if self.stats().denoising_steps == 1:
            self.hangs.set()
            assert self.go_on.wait(BOUND_S)
        return super().step()

    def start(self, job: EngineJob) -> None:
        self._note("start")
        super().start(job)

    def stop(self, job_id: str) -> None:
        self._note("stop")
        super().stop(job_id)

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        self._note("checkpoint")
        return super().checkpoint(job_id)

    def close(self) -> None:
        self.closed = True
        super().close()

    def _note(self, call: str) -> None:
        if self.go_on.is_set():
            self.calls_after.append(call)


class LoopOf(Protocol):
    def __call__(self, engine: FakeEngine, *, every_steps: int = 0) -> StepLoop: ...


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def loop_of(reports: Reports) -> Iterator[LoopOf]:
    made: list[StepLoop] = []

    def make(engine: FakeEngine, *, every_steps: int = 0) -> StepLoop:
        loop = StepLoop(engine, on_report=reports.step, on_failure=reports.failed, checkpoint_every_steps=every_steps)
        loop.begin()
        made.append(loop)
        return loop

    yield make
    for loop in made:
        loop.close(BOUND_S)


def job(name: str, checkpoint: CanvasCheckpoint | None = None) -> EngineJob:
    return EngineJob(name, (3, 4), SAMPLING, checkpoint=checkpoint)


def started(future: Future[None]) -> None:
    future.result(BOUND_S)


def test_a_job_runs_to_its_end(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=2, steps_per_canvas=2))
    started(loop.start(job("a")))
    reports.wait(lambda: reports.ended("a"))


def test_a_start_waits_for_a_free_slot(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=2, step_time_ms=2.0))
    futures = [loop.start(job(name)) for name in ("a", "b", "c")]
    for future in futures:
        started(future)
    reports.wait(lambda: all(reports.ended(name) for name in ("a", "b", "c")))


def test_a_stopped_job_makes_no_more_steps(loop_of: LoopOf) -> None:
    engine = FakeEngine(CARD, slots=1, steps_per_canvas=1000, step_time_ms=2.0)
    loop = loop_of(engine)
    started(loop.start(job("a")))
    loop.stop("a")
    started(loop.start(job("b")))  # there is one slot: "b" starts only after "a" is gone
    assert engine.stats().active_jobs == 1


def test_a_job_stopped_before_its_start_never_starts(loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1000, step_time_ms=2.0))
    started(loop.start(job("a")))
    waiting = loop.start(job("b"))
    loop.stop("b")
    assert waiting.cancelled()


def test_a_refused_job_tells_why_and_the_loop_goes_on(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1))
    with pytest.raises(ValueError, match="token"):
        started(loop.start(EngineJob("bad", (999,), SAMPLING)))
    started(loop.start(job("good")))
    reports.wait(lambda: reports.ended("good"))


def test_a_broken_engine_is_told_once_and_takes_nothing_more(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=8, fail_at_step=2))
    started(loop.start(job("a")))
    reports.wait(lambda: bool(reports.failures))
    assert loop.failure is reports.failures[0]
    with pytest.raises(EngineError):
        started(loop.start(job("b")))
    assert len(reports.failures) == 1


def test_a_released_job_gives_the_step_that_was_reported_last(reports: Reports, loop_of: LoopOf) -> None:
    engine = FakeEngine(CARD, slots=2, steps_per_canvas=1000, step_time_ms=1.0)
    loop = loop_of(engine)
    started(loop.start(job("a")))
    started(loop.start(job("b")))
    reports.wait(lambda: len(reports.steps_of("a")) >= 3)
    checkpoint = loop.release("a").result(BOUND_S)
    assert checkpoint is not None
    # Every step before it was reported before it, and none follows.
    assert reports.steps_of("a") == list(range(1, checkpoint.step + 1))
    more = len(reports.steps) + 3
    reports.wait(lambda: len(reports.steps) > more)
    assert len(reports.steps_of("a")) == checkpoint.step
    assert engine.stats().active_jobs == 1


def test_a_release_comes_after_the_commits_before_it(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1, step_time_ms=1.0))
    started(loop.start(job("a")))
    reports.wait(lambda: bool(reports.steps))
    at_release: list[int] = []
    future = loop.release("a")
    future.add_done_callback(lambda _: at_release.append(len(reports.steps)))
    assert future.result(BOUND_S) is None  # a canvas of one step is always at its boundary
    reports.wait(lambda: bool(at_release))
    assert at_release == [len(reports.steps)]


def test_the_release_of_a_waiting_job_gives_nothing_and_it_never_starts(loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1000, step_time_ms=2.0))
    started(loop.start(job("a")))
    waiting = loop.start(job("b"))
    assert loop.release("b").result(BOUND_S) is None
    assert waiting.cancelled()


def test_the_release_of_an_unknown_or_finished_job_gives_nothing(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1))
    assert loop.release("nobody").result(BOUND_S) is None
    started(loop.start(job("a")))
    reports.wait(lambda: reports.ended("a"))
    assert loop.release("a").result(BOUND_S) is None


def test_a_released_canvas_goes_on_where_it_was(reports: Reports, loop_of: LoopOf) -> None:
    first = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=8, step_time_ms=5.0))
    started(first.start(job("a")))
    reports.wait(lambda: bool(reports.steps_of("a")))
    checkpoint = first.release("a").result(BOUND_S)
    assert checkpoint is not None
    second = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=8))
    started(second.start(job("again", checkpoint)))
    reports.wait(lambda: reports.ended("again"))
    canvas = reports.steps_of("again")[: 8 - checkpoint.step]
    assert canvas == list(range(checkpoint.step + 1, 9))


@pytest.mark.parametrize(
    ("version", "payload", "why"),
    [("v2", b"whatever", "version v2"), ("v1", b"damaged", "checksum")],
    ids=["of another model", "damaged"],
)
def test_a_checkpoint_that_the_engine_refuses_replays_the_canvas_with_one_warning(
    reports: Reports, loop_of: LoopOf, caplog: pytest.LogCaptureFixture, version: str, payload: bytes, why: str
) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=4))
    with caplog.at_level(logging.WARNING):
        started(loop.start(job("a", CanvasCheckpoint(version, 0, 3, payload))))
        reports.wait(lambda: reports.ended("a"))
    assert reports.steps_of("a")[:4] == [1, 2, 3, 4]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "job a" in warning
    assert why in warning


def test_a_job_that_is_refused_without_its_checkpoint_too_is_refused(loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=4))
    bad = EngineJob("bad", (999,), SAMPLING, checkpoint=CanvasCheckpoint("v2", 0, 3, b""))
    with pytest.raises(ValueError, match="token 999"):
        started(loop.start(bad))


def test_checkpoints_come_every_few_steps_but_never_at_a_boundary(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=6), every_steps=3)
    started(loop.start(job("a")))
    reports.wait(lambda: reports.ended("a"))
    given = [(name, checkpoint.canvas_index, checkpoint.step) for name, checkpoint in reports.checkpoints]
    assert given == [("a", 0, 3), ("a", 1, 3)]


def test_no_checkpoints_come_by_themselves_unless_asked(reports: Reports, loop_of: LoopOf) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=6))
    started(loop.start(job("a")))
    reports.wait(lambda: reports.ended("a"))
    assert reports.checkpoints == []


def test_an_abandoned_thread_that_comes_back_does_nothing_and_ends(reports: Reports, loop_of: LoopOf) -> None:
    engine = HangingEngine()
    loop = loop_of(engine)
    started(loop.start(job("a")))
    assert engine.hangs.wait(BOUND_S)
    waiting, release = loop.start(job("b")), loop.release("a")
    failure = EngineError("it hangs")
    loop.abandon(failure)
    for future in (waiting, release, loop.start(job("c")), loop.release("a")):
        assert future.exception(BOUND_S) is failure
    told = len(reports.steps)
    loop.stop("a")
    engine.go_on.set()
    loop._thread.join(BOUND_S)
    assert not loop._thread.is_alive()
    assert (len(reports.steps), reports.failures, engine.calls_after) == (told, [], [])


def test_closing_does_not_wait_for_an_abandoned_thread(loop_of: LoopOf) -> None:
    engine = HangingEngine()
    loop = loop_of(engine)
    started(loop.start(job("a")))
    assert engine.hangs.wait(BOUND_S)
    loop.abandon(EngineError("it hangs"))
    with pytest.raises(EngineError, match="not closed"):
        loop.close(3600.0)
    assert not engine.closed
    engine.go_on.set()
    loop._thread.join(BOUND_S)


def test_a_failing_engine_ends_a_release_that_waits(reports: Reports, loop_of: LoopOf) -> None:
    class Broken(FakeEngine):
        def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
            raise RuntimeError("the device is gone")

    loop = loop_of(Broken(CARD, slots=1, steps_per_canvas=1000, step_time_ms=1.0))
    started(loop.start(job("a")))
    with pytest.raises(EngineError, match="device is gone"):
        loop.release("a").result(BOUND_S)
    reports.wait(lambda: bool(reports.failures))


def test_the_thread_is_busy_in_a_step_and_not_while_it_waits(loop_of: LoopOf) -> None:
    engine = HangingEngine()
    loop = loop_of(engine)
    assert loop.busy_s == 0.0
    started(loop.start(job("a")))
    assert engine.hangs.wait(BOUND_S)
    assert loop.busy_s > 0.0
    loop.stop("a")
    engine.go_on.set()
    started(loop.start(job("b")))  # the one slot is free again
    loop.release("b").result(BOUND_S)
    for _ in range(1000):
        if loop.busy_s == 0.0:
            break
        threading.Event().wait(0.01)
    assert loop.busy_s == 0.0
