"""Trains the demo checkpoint on one CPU thread: `python -m models.train_tiny --out models/tiny`.

Four phases of fixed wall time, each with linearly decaying rates; later ones give more to what is hard.
A run is seeded. Because phases are timed, two machines see the same examples but stop at different steps.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.export import load_checkpoint, save_checkpoint
from models.muon import Muon
from models.net import Shape, TrainingModel
from models.packing import Pack, Packer, attention_masks, segment_tokens
from models.renoise import next_canvases
from models.tasks import TASKS, Example, draw_example

SHORT_ROW_TOKENS, LONG_ROW_TOKENS = 128, 288
WARM_UP_STEPS = 40
SNAPSHOT_S = 300.0


@dataclass(frozen=True)
class Phase:
    """One stretch of training. Rates are peaks; weights are task frequencies in the short rows."""

    minutes: float
    muon_rate: float
    adam_rate: float
    weights: dict[str, float]
    final_rate_share: float
    sampled_share: float
    short_rows: int = 16
    long_rows: int = 4
    averages: bool = False  # ends with the mean of the weights before and after the phase


# Tasks that are not named have weight 1. JSON orders fill the long rows instead. Phases 2 to 4
# leave out the two tasks that a model of this size did not learn in the time.
PHASE_1_WEIGHTS = {"add": 2.0, "add_long": 2.0, "running_sum": 1.5, "sort_words": 0.5}
PHASE_2_WEIGHTS = {
    "add": 3.0,
    "count": 2.0,
    "count_down": 2.0,
    "sort_words": 0.7,
    "sort_more_words": 1.3,
    "reverse_words": 1.5,
    "sort_long": 1.5,
    "reverse": 0.7,
    "sort": 0.7,
    "upper": 0.7,
    "add_long": 0.0,
    "running_sum": 0.0,
}
PHASE_3_WEIGHTS = PHASE_2_WEIGHTS | {
    "add": 1.5,
    "sort_words": 1.3,
    "sort_more_words": 2.7,
    "reverse_words": 1.0,
    "sort_long": 1.0,
}


def weights(changes: dict[str, float]) -> dict[str, float]:
    return {task: changes.get(task, 1.0) for task in TASKS if not task.startswith("json")}


def plan(minutes: list[float]) -> list[Phase]:
    """The recipe of models/tiny with the wall time of each phase."""
    return [
        Phase(minutes[0], 0.02, 3e-3, weights(PHASE_1_WEIGHTS), 0.2, 0.3),
        Phase(minutes[1], 0.014, 2e-3, weights(PHASE_2_WEIGHTS), 0.0, 0.5),
        Phase(minutes[2], 0.009, 1.2e-3, weights(PHASE_3_WEIGHTS), 0.0, 0.5),
        Phase(
            minutes[3],
            0.006,
            8e-4,
            weights(PHASE_3_WEIGHTS),
            0.0,
            0.5,
            short_rows=8,
            long_rows=8,
            averages=True,
        ),
    ]


class ExampleStream:
    """Endless packs of random examples: short rows for most, long rows for the rest and for JSON orders."""

    def __init__(self, seed: int, phase: Phase) -> None:
        self._random = random.Random(seed)
        self._weights, self._rows = phase.weights, (phase.short_rows, phase.long_rows)
        self._packers = (
            Packer(self._random, phase.short_rows, SHORT_ROW_TOKENS),
            Packer(self._random, phase.long_rows, LONG_ROW_TOKENS),
        )
        self._waiting: tuple[list[Example], list[Example]] = ([], [])

    def _refill(self) -> None:
        short, long = self._waiting
        while len(short) < 4 * self._rows[0]:
            task = self._random.choices(list(self._weights), list(self._weights.values()))[0]
            example = draw_example(self._random, task)
            (short if segment_tokens(example) <= SHORT_ROW_TOKENS else long).append(example)
        while len(long) < 3 * self._rows[1]:
            task = self._random.choices(("json", "json_name_first"), (4, 1))[0]
            long.append(draw_example(self._random, task))

    def packs(self) -> Iterator[list[Pack]]:
        while True:
            self._refill()
            random_share = self._random.uniform(0.30, 0.45)
            filled = [
                packer.pack(waiting, random_share) for packer, waiting in zip(self._packers, self._waiting, strict=True)
            ]
            self._waiting = (filled[0][1], filled[1][1])
            yield [pack for pack, _ in filled]


class Trainer:
    """Owns the model, its optimisers and the clock of a run."""

    def __init__(self, model: TrainingModel, seed: int) -> None:
        self.model = model
        self._forward = torch.compile(model)
        self._random = torch.Generator().manual_seed(seed)
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim > 1 and "embed" not in name and "router" not in name]
        others = [p for name, p in named if p.ndim == 1 or "embed" in name or "router" in name]
        self._muon = Muon(matrices, lr=0.0)
        self._adam = torch.optim.Adam(others, lr=0.0, betas=(0.9, 0.98), fused=True)

    def step(self, packs: list[Pack], muon_rate: float, adam_rate: float, sampled_share: float) -> float:
        """One update; returns the mean cross entropy per weighted canvas token, in nats."""
        self._muon.param_groups[0]["lr"], self._adam.param_groups[0]["lr"] = muon_rate, adam_rate
        total = sum(pack.weight.sum() for pack in packs)
        loss_sum = 0.0
        for pack in packs:
            loss = self._loss(pack, sampled_share) / total
            torch.autograd.backward(loss)
            loss_sum += float(loss.detach())
        for optimiser in (self._muon, self._adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        return loss_sum

    def _loss(self, pack: Pack, sampled_share: float) -> Tensor:
        masks = attention_masks(pack, self.model.shape.window_tokens)
        noised, soft = self._self_condition(pack, masks, sampled_share)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self._forward(noised, pack.position, masks, pack.is_canvas, soft)
        losses = F.cross_entropy(logits.flatten(0, 1), pack.clean.flatten(), reduction="none")
        return (losses * pack.weight.flatten()).sum()

    @torch.no_grad()
    def _self_condition(self, pack: Pack, masks: dict[str, Tensor], sampled_share: float) -> tuple[Tensor, Tensor]:
        """A first pass over half of the rows gives their canvases self-conditioning.

        A share of those canvases then moves on to what the sampler would show the model at its next step.
        """
        half = pack.noised.shape[0] // 2
        zero = torch.zeros(*pack.noised.shape, self.model.shape.hidden)
        with torch.autocast("cpu", torch.bfloat16):
            first = {kind: mask[:half] for kind, mask in masks.items()}
            is_canvas = pack.is_canvas[:half]
            logits = self._forward(pack.noised[:half], pack.position[:half], first, is_canvas, zero[:half])
        heat = 0.4 + 0.4 * torch.rand((half, 1, 1), generator=self._random)
        cooled = logits.float() / heat
        zero[:half] = self.model.soft_embeddings(cooled) * is_canvas[..., None]
        noised = pack.noised.clone()
        noised[:half] = next_canvases(pack.noised[:half], cooled, is_canvas, sampled_share, self._random)
        return noised, zero


def run_phase(trainer: Trainer, phase: Phase, seed: int, snapshots: Path | None) -> None:
    """Trains for `phase.minutes`, prints progress every 100 steps, saves a snapshot every 5 minutes."""
    stream = ExampleStream(seed, phase).packs()
    trainer.step(next(stream), 0.0, 0.0, phase.sampled_share)  # compiles before the clock starts
    begin_s = last_s = time.monotonic()
    shown_s, average, steps, tokens = begin_s, 0.0, 0, 0
    while (elapsed_s := (last_s := time.monotonic()) - begin_s) < phase.minutes * 60:
        done = elapsed_s / (phase.minutes * 60)
        rate = min(1.0, (steps + 1) / WARM_UP_STEPS) * (1 - done * (1 - phase.final_rate_share))
        packs = next(stream)
        loss = trainer.step(packs, phase.muon_rate * rate, phase.adam_rate * rate, phase.sampled_share)
        steps, tokens = steps + 1, tokens + sum(pack.clean.numel() for pack in packs)
        average = loss if steps == 1 else average + 0.02 * (loss - average)
        if steps % 100 == 0:
            speed = tokens / elapsed_s
            where = f"{elapsed_s / 60:5.1f} min  step {steps:6d}"
            print(f"{where}  loss {average:.4f}  {speed:.0f} tokens/s", flush=True)
        if snapshots is not None and last_s - shown_s > SNAPSHOT_S:
            save_checkpoint(trainer.model, snapshots / f"snapshot-{elapsed_s / 60:.0f}")
            shown_s = last_s


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder of the checkpoint to write")
    target.add_argument("--eval-only", type=Path, metavar="DIR", help="train nothing, run models.eval_tiny on DIR")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes-1", type=float, default=25.0, help="first phase, wall time")
    parser.add_argument("--minutes-2", type=float, default=28.0, help="second phase, wall time")
    parser.add_argument("--minutes-3", type=float, default=13.0, help="third phase, wall time")
    parser.add_argument("--minutes-4", type=float, default=8.0, help="fourth phase, wall time, mostly JSON orders")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--init", type=Path, help="checkpoint folder to go on from")
    parser.add_argument("--snapshots", type=Path, help="folder for a snapshot every 5 minutes")
    arguments = parser.parse_args()
    if arguments.init is not None and not (arguments.init / "model.safetensors").is_file():
        parser.error(f"--init: {arguments.init} is not a checkpoint folder")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.eval_only is not None:
        sys.exit(subprocess.call([sys.executable, "-m", "models.eval_tiny", str(arguments.eval_only)]))
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    if arguments.init is None:
        model = TrainingModel(Shape(experts=arguments.experts, layers=arguments.layers))
    else:
        model = load_checkpoint(arguments.init)
    trainer = Trainer(model, arguments.seed)
    minutes = [arguments.minutes_1, arguments.minutes_2, arguments.minutes_3, arguments.minutes_4]
    for number, phase in enumerate(plan(minutes), 1):
        if phase.minutes > 0:
            print(f"phase {number}: {phase.minutes} minutes", flush=True)
            snapshots = arguments.snapshots and arguments.snapshots / f"phase-{number}"
            before = {name: value.clone() for name, value in model.state_dict().items()}
            run_phase(trainer, phase, arguments.seed + number, snapshots)
            if phase.averages:
                model.load_state_dict({k: (v + before[k]) / 2 for k, v in model.state_dict().items()})
            save_checkpoint(model, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
