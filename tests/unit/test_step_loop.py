"""The thread that drives an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from cluster.core import ModelCard, SamplingParams
from cluster.errors import EngineError
from deployments.engine.api import EngineJob, StepReport
from deployments.engine.fake import FakeEngine
from deployments.step_loop import StepLoop

SAMPLING = SamplingParams(1, 16, 8, 0.1, 0.4, 0.8, 0.005, 1)
CARD = ModelCard("fake", "v1", 128, 8, 256, 2, 0, (1,), SAMPLING)
BOUND_S = 10.0


class Reports:
    """Collects what the loop says, and lets a test wait for it."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.failures: list[EngineError] = []
        self._changed = threading.Condition()

    def step(self, report: StepReport) -> None:
        with self._changed:
            self.steps.append(report)
            self._changed.notify_all()

    def failed(self, failure: EngineError) -> None:
        with self._changed:
            self.failures.append(failure)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, BOUND_S)

    def ended(self, job_id: str) -> bool:
        return any(commit.last and commit.job_id == job_id for report in self.steps for commit in report.commits)


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def loop_of(reports: Reports) -> Iterator[Callable[[FakeEngine], StepLoop]]:
    made: list[StepLoop] = []

    def make(engine: FakeEngine) -> StepLoop:
        loop = StepLoop(engine, on_report=reports.step, on_failure=reports.failed)
        loop.begin()
        made.append(loop)
        return loop

    yield make
    for loop in made:
        loop.close(BOUND_S)


def job(name: str) -> EngineJob:
    return EngineJob(name, (3, 4), SAMPLING)


def started(future: Future[None]) -> None:
    future.result(BOUND_S)


def test_a_job_runs_to_its_end(reports: Reports, loop_of: Callable[[FakeEngine], StepLoop]) -> None:
    loop = loop_of(FakeEngine(CARD, slots=2, steps_per_canvas=2))
    started(loop.start(job("a")))
    reports.wait(lambda: reports.ended("a"))


def test_a_start_waits_for_a_free_slot(reports: Reports, loop_of: Callable[[FakeEngine], StepLoop]) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=2, step_time_ms=2.0))
    futures = [loop.start(job(name)) for name in ("a", "b", "c")]
    for future in futures:
        started(future)
    reports.wait(lambda: all(reports.ended(name) for name in ("a", "b", "c")))


def test_a_stopped_job_makes_no_more_steps(loop_of: Callable[[FakeEngine], StepLoop]) -> None:
    engine = FakeEngine(CARD, slots=1, steps_per_canvas=1000, step_time_ms=2.0)
    loop = loop_of(engine)
    started(loop.start(job("a")))
    loop.stop("a")
    started(loop.start(job("b")))  # there is one slot: "b" starts only after "a" is gone
    assert engine.stats().active_jobs == 1


def test_a_job_stopped_before_its_start_never_starts(loop_of: Callable[[FakeEngine], StepLoop]) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1000, step_time_ms=2.0))
    started(loop.start(job("a")))
    waiting = loop.start(job("b"))
    loop.stop("b")
    assert waiting.cancelled()


def test_a_refused_job_tells_why_and_the_loop_goes_on(
    reports: Reports, loop_of: Callable[[FakeEngine], StepLoop]
) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=1))
    with pytest.raises(ValueError, match="token"):
        started(loop.start(EngineJob("bad", (999,), SAMPLING)))
    started(loop.start(job("good")))
    reports.wait(lambda: reports.ended("good"))


def test_a_broken_engine_is_told_once_and_takes_nothing_more(
    reports: Reports, loop_of: Callable[[FakeEngine], StepLoop]
) -> None:
    loop = loop_of(FakeEngine(CARD, slots=1, steps_per_canvas=8, fail_at_step=2))
    started(loop.start(job("a")))
    reports.wait(lambda: bool(reports.failures))
    assert loop.failure is reports.failures[0]
    with pytest.raises(EngineError):
        started(loop.start(job("b")))
    assert len(reports.failures) == 1
