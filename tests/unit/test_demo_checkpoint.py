"""The demo checkpoint keeps its promises, on the engine that serves it and in transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.engine import TorchEngine, load_engine
from deployments.tokenizer import Tokenizer
from models.tasks import BASE_TASKS, CANONICAL, draw_example

MODELS = Path(__file__).resolve().parents[2] / "models"
TINY = MODELS / "tiny"
MAX_BYTES = 4 * 2**20
EXAMPLES_PER_TASK = 20
# Far below the card's figure: a floor that no seed misses, not a measurement.
FLOOR = 0.9


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    engine = load_engine(TINY, slots=32, device="cpu")
    yield engine
    engine.close()


def answers(engine: TorchEngine, prompts: Sequence[str], seed: int) -> list[str]:
    """The engine's answers, all prompts in one batch after another."""
    tokenizer = Tokenizer(TINY)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    waiting = list(enumerate(prompts))
    while waiting or engine.stats().active_jobs:
        while waiting and engine.stats().active_jobs < engine.slots:
            number, prompt = waiting.pop()
            sampling = replace(engine.card.defaults, seed=seed + number)
            engine.start(EngineJob(str(number), tuple(tokenizer.encode_messages([("user", prompt)])), sampling))
        for commit in engine.step().commits:
            tokens[commit.job_id].extend(commit.tokens)
    ends = set(engine.card.eos_token_ids)
    cut = ([*row, *ends] for row in tokens.values())
    return [tokenizer.decode(row[: next(i for i, token in enumerate(row) if token in ends)]) for row in cut]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_promised_forms_have_exactly_the_promised_answers(engine: TorchEngine, seed: int) -> None:
    got = answers(engine, [example.prompt for example in CANONICAL], seed)
    assert got == [example.answer for example in CANONICAL]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_prompts_are_answered_right(engine: TorchEngine, seed: int) -> None:
    demo = json.loads((MODELS / "demo_prompts.json").read_text())
    assert answers(engine, [entry["prompt"] for entry in demo], seed) == [entry["answer"] for entry in demo]


@pytest.mark.parametrize("task", BASE_TASKS)
def test_a_base_task_is_mostly_answered_right(engine: TorchEngine, task: str) -> None:
    rng = random.Random(task)
    examples = [draw_example(rng, task) for _ in range(EXAMPLES_PER_TASK)]
    got = answers(engine, [example.prompt for example in examples], seed=7)
    right = sum(text == example.answer for text, example in zip(got, examples, strict=True))
    assert right >= FLOOR * len(examples)


def test_transformers_loads_it_with_no_key_missing_or_left_over() -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(TINY, dtype=torch.float32, output_loading_info=True)
    report = loaded[1]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_it_is_small_enough_to_live_in_the_repository() -> None:
    assert (TINY / "model.safetensors").stat().st_size <= MAX_BYTES
