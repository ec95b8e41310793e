"""Exact match and denoising steps of a checkpoint: `python -m models.eval_tiny models/tiny`.

Runs transformers' own generate: dynamic cache, float32 compute, defaults of generation_config.json. Prompts
of one length share a batch, so that no prompt is padded. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

from models.tasks import BELOW_TARGET, CANONICAL, CANVAS_TOKENS, TASKS, Example, draw_example

BATCH = 64
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What generate made of one example: the text before EOS, canvases (count), denoising steps (count)."""

    example: Example
    text: str
    canvases: int
    steps: int

    @property
    def exact(self) -> bool:
        return self.text == self.example.answer


class Generator:
    """A checkpoint and its tokenizer, loaded by transformers."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32)

    def answer(self, examples: list[Example]) -> Iterator[Outcome]:
        """Yields one outcome per example, in order of prompt length."""
        by_length: dict[int, list[tuple[Example, list[int]]]] = defaultdict(list)
        for example in examples:
            chat = [{"role": "user", "content": example.prompt}]
            text = str(self._tokenizer.apply_chat_template(chat, tokenize=False))
            tokens: list[int] = self._tokenizer(text)["input_ids"]
            by_length[len(tokens)].append((example, tokens))
        for _, group in sorted(by_length.items()):
            for begin in range(0, len(group), BATCH):
                yield from self._answer_batch(group[begin : begin + BATCH])

    @torch.no_grad()
    def _answer_batch(self, group: list[tuple[Example, list[int]]]) -> Iterator[Outcome]:
        prompts = torch.tensor([tokens for _, tokens in group])
        generate: Callable[..., Any] = self._model.generate
        result = generate(prompts, return_dict_in_generate=True)
        for row, (example, tokens) in enumerate(group):
            new = result.sequences[row, len(tokens) :]
            kept = int((new != 0).sum())
            text = str(self._tokenizer.decode(new, skip_special_tokens=True))
            steps = round(kept / float(result.tokens_per_forward[row]))
            yield Outcome(example, text, math.ceil(max(kept, 1) / CANVAS_TOKENS), steps)


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    canvases = sum(outcome.canvases for outcome in outcomes)
    exact = sum(outcome.exact for outcome in outcomes)
    return {
        "exact": exact,
        "prompts": len(outcomes),
        "exact_percent": round(100 * exact / len(outcomes), 2),
        "steps_per_canvas": round(sum(outcome.steps for outcome in outcomes) / canvases, 2),
    }


def evaluate(generator: Generator, tasks: list[str], count: int, seed: int, show: int) -> Rows:
    """Summaries per task; prints the table row by row and up to `show` wrong answers of each task."""
    rows: Rows = {}
    for task in tasks:
        rng = random.Random(f"{seed}/{task}")
        begin_s = time.monotonic()
        examples = [draw_example(rng, task) for _ in range(count)]
        outcomes = list(generator.answer(examples))
        rows[task] = row = summary(outcomes)
        taken_s = time.monotonic() - begin_s
        print(
            f"{task:14s} {row['exact']:5.0f}/{row['prompts']:<5.0f} {row['exact_percent']:6.2f} %"
            f" {row['steps_per_canvas']:6.2f} steps/canvas {taken_s:6.1f} s",
            flush=True,
        )
        for wrong in [outcome for outcome in outcomes if not outcome.exact][:show]:
            print(f"    {wrong.example.prompt!r}: {wrong.text!r}, not {wrong.example.answer!r}")
    return rows


def check_list(generator: Generator, examples: list[Example], seeds: int) -> dict[str, float]:
    """Each example alone, once per seed; prints what is wrong and the steps taken."""
    outcomes: list[Outcome] = []
    for example in examples:
        for seed in range(seeds):
            torch.manual_seed(seed)
            outcomes += generator.answer([example])
        right = sum(outcome.exact for outcome in outcomes[-seeds:])
        steps = [outcome.steps for outcome in outcomes[-seeds:]]
        print(f"{right}/{seeds} steps {steps} {example.prompt!r} -> {outcomes[-1].text!r}")
    return summary(outcomes)


def read_prompts(path: Path) -> list[Example]:
    """A JSON list of {"prompt", "answer"}."""
    return [Example("demo", **entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=[task for task in TASKS if task not in BELOW_TARGET],
    )
    parser.add_argument("--count", type=int, default=500, help="prompts per task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task")
    parser.add_argument("--prompts", type=Path, help="a JSON list of prompts and answers to check instead")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each listed prompt")
    arguments = parser.parse_args()
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"checkpoint: {arguments.checkpoint} is not a folder with a config.json")
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    generator = Generator(arguments.checkpoint)
    if arguments.prompts is not None:
        print(json.dumps(check_list(generator, read_prompts(arguments.prompts), arguments.seeds)))
        return
    rows = evaluate(generator, arguments.tasks, arguments.count, arguments.seed, arguments.show)
    canonical = check_list(generator, list(CANONICAL), arguments.seeds)
    print(json.dumps({"checkpoint": str(arguments.checkpoint), "tasks": rows, "canonical": canonical}))


if __name__ == "__main__":
    main()
