"""Jobs for vLLM and torch alike, and what an engine made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.core import ModelCard
from deployments.engine.api import Commit, Engine, EngineJob, Progress
from tests.contract.engines import drive
from tests.oracle import copy_checkpoint, encode, some_checkpoint

TEXTS = ("count 31 to 38", "upper amber", "reverse 407", "sort 407", "Order 4821 from A", "ab", "z", "hello there")


def varied_jobs(card: ModelCard, count: int, canvases: int = 1) -> list[EngineJob]:
    """Jobs of all kinds of settings, with prompts that leave a canvas of a tiny model its whole window."""
    return [
        EngineJob(
            f"job-{number}",
            encode(TEXTS[number % len(TEXTS)]),
            replace(
                card.defaults,
                seed=100 + number,
                max_new_tokens=canvases * card.canvas_tokens,
                max_denoising_steps=4 + number % 9,
                entropy_bound=0.02 if number % 2 else 0.5,
                confidence_threshold=1e-4,
                stability_threshold=number % 3,
            ),
        )
        for number in range(count)
    ]


def run_all(engine: Engine, jobs: Sequence[EngineJob]) -> tuple[list[Progress], list[Commit]]:
    """Runs jobs in batches as large as the engine has slots."""
    progress, commits = [], []
    for first in range(0, len(jobs), engine.slots):
        for job in jobs[first : first + engine.slots]:
            engine.start(job)
        run = drive(engine)
        progress += run.progress
        commits += run.commits
    return progress, commits


def tokens_of(commits: Sequence[Commit]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(commit.job_id, commit.canvas_index): commit.tokens for commit in commits}


def changed_checkpoint(folder: Path, **text: Any) -> Path:  # noqa: ANN401
    """A copy of the tiny checkpoint with other numbers in the text part of its configuration."""
    source = some_checkpoint()
    assert source is not None
    path = copy_checkpoint(source, folder)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= text
    (path / "config.json").write_text(json.dumps(config))
    return path
