"""Waiting context, commits and canvases in progress share steps: who waits for what, and what rows cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from cluster.checkpoint import Checkpoint
from deployments.engine.api import EngineJob, StepReport
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine
from deployments.engine.torch_tp.model import Model


def engine(checkpoint: Checkpoint, portion: int) -> TorchEngine:
    return TorchEngine(checkpoint, EngineSettings(slots=8, device="cpu", prefill_tiles_per_step=portion))


def job(checkpoint: Checkpoint, name: str, prompt_tiles: int, token: int = 40, steps: int = 3) -> EngineJob:
    """A prompt of `prompt_tiles` full tiles of one token, so that jobs of other tokens share nothing."""
    sampling = replace(
        checkpoint.card.defaults,
        max_new_tokens=4 * checkpoint.card.canvas_tokens,
        max_denoising_steps=steps,
        confidence_threshold=1e-9,
    )
    return EngineJob(name, (token,) * (prompt_tiles * checkpoint.card.canvas_tokens), sampling)


def names(report: StepReport) -> list[str]:
    return [progress.job_id for progress in report.progress]


@pytest.mark.parametrize("portion", [1, 4])
def test_waiting_prompts_hold_up_a_canvas_by_one_portion_a_step(checkpoint: Checkpoint, portion: int) -> None:
    runner = engine(checkpoint, portion)
    runner.start(job(checkpoint, "running", 1, token=30, steps=40))
    runner.step()
    for number in range(6):
        runner.start(job(checkpoint, f"waiting-{number}", 9, token=40 + number))
    steps = 0
    while runner.stats().prefill_tokens < (1 + 6 * 9) * checkpoint.card.canvas_tokens:
        before, report = runner.stats(), runner.step()
        steps += 1
        encoded = runner.stats().prefill_tokens - before.prefill_tokens
        committed = sum(progress.canvas_index > 0 and progress.step == 1 for progress in report.progress)
        assert encoded <= (portion + committed) * checkpoint.card.canvas_tokens
        assert "running" in names(report)
    assert steps <= 6 * 9 / portion + 1


def test_a_short_prompt_does_not_wait_for_a_long_one_before_it(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, 2)
    for number in range(3):
        runner.start(job(checkpoint, f"long-{number}", 20, token=40 + number))
    runner.step()
    runner.start(job(checkpoint, "short", 2, token=50))
    waited = 1
    while "short" not in names(runner.step()):
        waited += 1
    # Four prompts take turns, two tiles a step: the second tile of the short one comes with the eighth at the latest.
    assert waited <= 4


def test_waiting_prompts_get_on_alike(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, 3)
    for number in range(4):
        runner.start(job(checkpoint, f"job-{number}", 6, token=40 + number))
    first: dict[str, int] = {}
    for step in range(8):
        for name in names(runner.step()):
            first.setdefault(name, step)
    assert list(first) == [f"job-{number}" for number in range(4)]
    assert max(first.values()) - min(first.values()) <= 1


def test_a_prompt_that_is_stopped_leaves_its_turn_to_the_others(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, 1)
    for number in range(2):
        runner.start(job(checkpoint, f"job-{number}", 3, token=40 + number))
    runner.step()
    runner.stop("job-0")
    seen = [names(runner.step()) for _ in range(3)]
    assert seen == [[], [], ["job-1"]]


def test_a_commit_and_the_next_canvas_share_a_step(checkpoint: Checkpoint) -> None:
    runner = engine(checkpoint, 4)
    runner.start(job(checkpoint, "a", 2))
    runner.step()
    commits: list[int] = []
    for _ in range(6):
        before = runner.stats().prefill_tokens
        report = runner.step()
        encoded = runner.stats().prefill_tokens - before
        assert encoded == (checkpoint.card.canvas_tokens if commits else 0)
        if commits:
            assert [(p.canvas_index, p.step) for p in report.progress] == [(commits[0] + 1, 1)]
        commits = [commit.canvas_index for commit in report.commits if not commit.last]
        if not runner.stats().active_jobs:
            break
    assert runner.stats().canvases > 1


def test_prompt_and_commit_rows_reach_neither_head_nor_sampler(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    headed: list[int] = []
    original = Model.logits

    def logits(self: Model, hidden: Tensor) -> Tensor:
        headed.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(Model, "logits", logits)
    runner = engine(checkpoint, 1)
    for number in range(3):
        runner.start(job(checkpoint, f"job-{number}", 1 + number, token=40 + number))
    denoised = []
    while runner.stats().active_jobs:
        denoised.append(len(runner.step().progress))
    assert headed == [count for count in denoised if count]
