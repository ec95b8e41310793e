"""The torch engine against transformers' own generate: tokens/s of the same answers, in one run.

Both sides run in float32 on one thread with the same prompts of mixed tasks and the checkpoint's own sampling
defaults. Only useful tokens count: those of an answer before its EOS. At 1, both sides take one prompt after the
other. At 8, transformers takes static batches of 8, left-padded and masked, as its users run it; the engine keeps 8
slots full. Sides alternate, and the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoint import Checkpoint, read_checkpoint
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "models" / "tiny"
MAX_NEW_TOKENS = 96
BATCH = 8
PROMPTS = 64
ROUNDS = 5
TURN, END_OF_TURN = 3, 4
NAMES = ("Acme Tools", "Blue Harbor", "North Mill", "Cedar Works", "Iron Gate")
CITIES = ("Oslo", "Turin", "Ghent", "Lyon", "Porto")
WORDS = ("amber", "tile", "river", "stone", "cloud", "maple", "north")

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """Useful tokens that one side made, and the seconds it took."""

    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def measure_engine_ratios(checkpoint_path: Path = CHECKPOINT, rounds: int = ROUNDS) -> dict[str, float]:
    """tokens/s of the engine over transformers, at 1 and at 8 concurrent jobs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        checkpoint = read_checkpoint(checkpoint_path)
        # Rounds repeat their prompts, which must not pay.
        engines = {
            size: TorchEngine(checkpoint, EngineSettings(slots=size, device="cpu", prefix_reuse=False))
            for size in (1, BATCH)
        }
        reference = load_reference(checkpoint_path)
        prompts = mixed_prompts(checkpoint, PROMPTS)
        figures = {}
        for size, engine in engines.items():
            ours, theirs = _Ours(engine, checkpoint), Reference(reference, checkpoint, size)
            figures[f"engine_over_transformers_{size}"] = _median_ratio(ours.run, theirs.run, prompts, rounds)
        return figures
    finally:
        torch.set_num_threads(threads)


def mixed_prompts(checkpoint: Checkpoint, count: int) -> list[Prompt]:
    """`count` prompts of six tasks in turn, shuffled, as token ids with the chat template."""
    rng = random.Random(4821)
    texts = [_task_text(rng, number % 6) for number in range(count)]
    rng.shuffle(texts)
    bos = () if checkpoint.card.bos_token_id is None else (checkpoint.card.bos_token_id,)
    return [(*bos, TURN, *map(ord, text), END_OF_TURN) for text in texts]


def _task_text(rng: random.Random, task: int) -> str:
    first, month, day = rng.randint(11, 80), rng.randint(1, 12), rng.randint(1, 28)
    order = f"Order {rng.randint(1000, 9999)} from {rng.choice(NAMES)} ships to {rng.choice(CITIES)} on 2024-"
    return (
        f"{order}{month:02}-{day:02}.",
        f"count {first} to {first + rng.randint(3, 9)}",
        f"reverse {rng.randint(10_000, 999_999)}",
        f"sort {rng.randint(10_000, 999_999)}",
        f"upper {' '.join(rng.sample(WORDS, 2))}",
        f"add {rng.randint(10, 99)} {rng.randint(10, 99)}",
    )[task]


def _median_ratio(
    ours: Callable[[Sequence[Prompt]], Timing],
    theirs: Callable[[Sequence[Prompt]], Timing],
    prompts: Sequence[Prompt],
    rounds: int,
) -> float:
    for side in (ours, theirs):
        side(prompts[: 2 * BATCH])
    pairs = [(ours(prompts), theirs(prompts)) for _ in range(rounds)]
    return statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in pairs)


def useful_tokens(canvases: Sequence[int], eos_token_ids: Sequence[int]) -> int:
    """How many of an answer's tokens come before its EOS."""
    ends = (place for place, token in enumerate(canvases) if token in eos_token_ids)
    return next(ends, len(canvases))


class _Ours:
    """The engine with every slot refilled as soon as it is free."""

    def __init__(self, engine: TorchEngine, checkpoint: Checkpoint) -> None:
        self._engine, self._card = engine, checkpoint.card

    def run(self, prompts: Sequence[Prompt]) -> Timing:
        sampling = replace(self._card.defaults, max_new_tokens=MAX_NEW_TOKENS)
        answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        waiting = [
            EngineJob(name, prompt, replace(sampling, seed=int(name)))
            for name, prompt in zip(answers, prompts, strict=True)
        ][::-1]
        engine, active = self._engine, 0
        start_s = time.perf_counter()
        while waiting or active:
            while waiting and active < engine.slots:
                engine.start(waiting.pop())
                active += 1
            for commit in engine.step().commits:
                answers[commit.job_id] += commit.tokens
                active -= commit.last
        seconds = time.perf_counter() - start_s
        return Timing(sum(useful_tokens(answer, self._card.eos_token_ids) for answer in answers.values()), seconds)


class Reference:
    """transformers' generate on static batches of at most `size` prompts."""

    def __init__(self, model: Any, checkpoint: Checkpoint, size: int) -> None:  # noqa: ANN401 - has no usable types
        self._model, self._card, self._size = model, checkpoint.card, size

    def run(self, prompts: Sequence[Prompt]) -> Timing:
        torch.manual_seed(0)
        tokens, start_s = 0, time.perf_counter()
        for first in range(0, len(prompts), self._size):
            tokens += sum(self.generate(prompts[first : first + self._size]))
        return Timing(tokens, time.perf_counter() - start_s)

    def generate(self, prompts: Sequence[Prompt]) -> list[int]:
        """The useful tokens of each answer of one batch."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._card.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        # Without padding it gets no mask, which is its faster path.
        masked = {} if bool(mask.all()) else {"attention_mask": mask}
        output = self._model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, **masked)
        answers = output.sequences[:, longest:].tolist()
        return [useful_tokens(answer, self._card.eos_token_ids) for answer in answers]


def load_reference(path: Path) -> Any:  # noqa: ANN401 - transformers has no usable types
    """transformers' model in float32."""
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference  # noqa: PLC0415 - dev only
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32)
    return model.eval()


if __name__ == "__main__":
    print(json.dumps(measure_engine_ratios()))
