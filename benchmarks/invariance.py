"""How often the batch changes a token: the same jobs alone and in full batches, in float32.

A draw is one position of one denoising step. Every step's argmax canvas is compared, so that a flip counts even when
the answer recovers from it. Prints one JSON line; the aim is 0.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.engine import CHECKPOINT, mixed_prompts
from cluster.checkpoint import Checkpoint, read_checkpoint
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine

SLOTS = 8
Steps = dict[tuple[str, int, int], tuple[int, ...]]


def measure_flips(checkpoint_path: Path = CHECKPOINT, jobs: int = 64, seed: int = 0) -> dict[str, float]:
    """Differing tokens and draws of `jobs` jobs, alone against among 7 others that come and go."""
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(checkpoint_path)
    work = [_job(checkpoint, number, prompt) for number, prompt in enumerate(mixed_prompts(checkpoint, jobs))]
    alone = _run(checkpoint, 1, work)
    random.Random(seed).shuffle(work)
    together = _run(checkpoint, SLOTS, work)
    draws = sum(map(len, alone.values()))
    differing = sum(_differing(canvas, together.get(step, ())) for step, canvas in alone.items())
    # Steps that only one of the runs made are counted in full.
    differing += sum(len(canvas) for step, canvas in together.items() if step not in alone)
    return {"draws": draws, "differing_tokens": differing, "flips_per_million_draws": differing / draws * 1e6}


def _job(checkpoint: Checkpoint, number: int, prompt: tuple[int, ...]) -> EngineJob:
    """Hot, hardly ever confident, of its own length: many steps, and batches that change all the time."""
    sampling = replace(
        checkpoint.card.defaults,
        seed=number,
        max_new_tokens=(1 + number % 3) * checkpoint.card.canvas_tokens,
        max_denoising_steps=8 + number % 17,
        confidence_threshold=1e-7,
        t_min=0.8,
        t_max=1.4,
    )
    return EngineJob(f"job-{number}", prompt, sampling, wants_drafts=True)


def _run(checkpoint: Checkpoint, slots: int, jobs: Sequence[EngineJob]) -> Steps:
    engine = TorchEngine(checkpoint, EngineSettings(slots=slots, device="cpu"))
    waiting, steps = list(jobs), Steps()
    while waiting or engine.stats().active_jobs:
        while waiting and engine.stats().active_jobs < slots:
            engine.start(waiting.pop())
        for made in engine.step().progress:
            steps[made.job_id, made.canvas_index, made.step] = made.draft_tokens
    return steps


def _differing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    same = sum(one == other for one, other in zip(ours, theirs, strict=False))
    return max(len(ours), len(theirs)) - same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--jobs", type=int, default=64)
    arguments = parser.parse_args()
    print(json.dumps(measure_flips(arguments.checkpoint, arguments.jobs)))


if __name__ == "__main__":
    main()
