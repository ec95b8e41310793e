"""What vLLM computes is what the torch engine computes, wherever vLLM's sliding window is the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.engine.api import Engine
from deployments.engine.torch_tp.engine import load_engine as load_torch
from deployments.engine.vllm_engine import VllmEngine
from tests.contract.engines import drive
from tests.oracle import encode, some_checkpoint
from tests.vllm.driving import changed_checkpoint, run_all, tokens_of, varied_jobs

# Both compute in float32, in another order.
ENTROPY_TOLERANCE = 1e-4


@pytest.fixture
def reference() -> Engine:
    path = some_checkpoint()
    assert path is not None
    return load_torch(path, slots=8, device="cpu")


def test_every_step_and_canvas_is_that_of_the_torch_engine(
    make: Callable[[int], VllmEngine], reference: Engine
) -> None:
    jobs = [replace(job, wants_drafts=True) for job in varied_jobs(reference.card, 24)]
    progress, commits = run_all(make(8), jobs)
    expected_progress, expected_commits = run_all(reference, jobs)
    assert tokens_of(commits) == tokens_of(expected_commits)
    ours = {(step.job_id, step.step): step for step in progress}
    theirs = {(step.job_id, step.step): step for step in expected_progress}
    assert ours.keys() == theirs.keys()
    for name, step in ours.items():
        assert step.draft_tokens == theirs[name].draft_tokens
        assert step.accepted_tokens == theirs[name].accepted_tokens
        assert step.mean_entropy == pytest.approx(theirs[name].mean_entropy, abs=ENTROPY_TOLERANCE)


def test_a_canvas_in_progress_moves_between_the_engines(make: Callable[[int], VllmEngine], reference: Engine) -> None:
    job = next(job for job in varied_jobs(reference.card, 8) if job.job_id == "job-4")
    (expected,) = tokens_of(run_all(reference, [job])[1]).values()
    engine = make(1)
    for first, second in ((engine, reference), (reference, engine)):
        first.start(job)
        run = drive(first, steps=3)
        assert not run.commits
        saved = first.checkpoint(job.job_id)
        assert saved is not None
        first.stop(job.job_id)
        second.start(replace(job, checkpoint=saved))
        run = drive(second)
        assert run.steps(job.job_id)[0] == (0, saved.step + 1)
        assert run.canvases(job.job_id) == [expected]


def test_committed_canvases_are_the_context_that_a_prefill_makes_of_them(tmp_path: Path) -> None:
    """vLLM writes a canvas to its cache in a forward of its own kind; on a wide window torch must agree with all that
    comes after it, and so must a retry, which prefills it."""
    path = changed_checkpoint(tmp_path / "wide", sliding_window=512)
    from deployments.engine.vllm_engine import load_engine

    reference = load_torch(path, slots=8, device="cpu")
    engine = load_engine(path, slots=8, enforce_eager=True)
    try:
        jobs = varied_jobs(reference.card, 40, canvases=4)
        commits = tokens_of(run_all(engine, jobs)[1])
        assert commits == tokens_of(run_all(reference, jobs)[1])
        long = next(job for job in jobs if (job.job_id, 3) in commits)
        kept = tuple(commits[long.job_id, index] for index in range(2))
        again = tokens_of(run_all(engine, [replace(long, committed=kept)])[1])
        assert again == {name: tokens for name, tokens in commits.items() if name[0] == long.job_id and name[1] >= 2}
    finally:
        engine.close()


def test_a_long_context_is_warned_of_once(make: Callable[[int], VllmEngine], caplog: pytest.LogCaptureFixture) -> None:
    engine = make(2)
    defaults = replace(engine.card.defaults, max_new_tokens=1)
    engine.start(replace(varied_jobs(engine.card, 1)[0], job_id="short"))
    assert not caplog.messages
    for name in ("long", "longer"):
        engine.stop("short")
        engine.start(
            replace(varied_jobs(engine.card, 1)[0], job_id=name, prompt_tokens=encode("x" * 60), sampling=defaults)
        )
        engine.stop(name)
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == ["long"]
