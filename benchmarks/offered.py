"""The load of benchmarks/gpu_vllm.py: what is asked, by how many at once, and what was recorded of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Below are special tokens of every tokenizer that Gemma's family has had.
FIRST_PLAIN_TOKEN = 256
# No ids from here on, where Gemma's tokenizers keep images' and unused tokens.
LAST_SHARE = 0.97


@dataclass(frozen=True, slots=True)
class Run:
    """What is asked: `rounds` requests of every caller at each number of `concurrent` callers."""

    concurrent: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    vocab_size: int
    canvas_tokens: int
    quantization: str | None = None
    eager: bool = False
    seed: int = 0

    @property
    def canvases(self) -> int:
        """Of one answer."""
        return -(-self.new_tokens // self.canvas_tokens)

    def share(self, prompts: Sequence[list[int]], concurrent: int) -> Sequence[list[int]]:
        """The prompts of one number of callers; behind the first, which is for warming up."""
        before = 1 + self.rounds * sum(count for count in self.concurrent if count < concurrent)
        return prompts[before : before + self.rounds * concurrent]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Run:
        """The inverse of `as_json`, after JSON has made lists of tuples."""
        return cls(**{**values, "concurrent": tuple(values["concurrent"])})


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a number of concurrent callers got in `wall_s`; of one answer, `wall_s` is 0.

    `denoising_steps` is None where they are not told: vLLM counts them for itself.
    """

    concurrent: int
    tokens: int
    denoising_steps: int | None
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Ask = Callable[[int, list[int]], Awaitable[Recorded]]


def random_prompts(run: Run) -> list[list[int]]:
    """All prompts of a run, no two alike, the same in every process; the first is for warming up."""
    drawn = random.Random(run.seed)
    low, high = min(FIRST_PLAIN_TOKEN, run.vocab_size // 2), int(run.vocab_size * LAST_SHARE)
    count = 1 + run.rounds * sum(run.concurrent)
    return [[drawn.randrange(low, high) for _ in range(run.prompt_tokens)] for _ in range(count)]


async def load(ask: Ask, prompts: Sequence[list[int]], concurrent: int) -> Recorded:
    """`concurrent` callers, each of whom asks again as soon as it is answered, until all prompts are."""
    waiting = list(enumerate(prompts))
    answers: list[Recorded] = []

    async def caller() -> None:
        while waiting:
            number, prompt = waiting.pop(0)
            answers.append(await ask(number, prompt))

    start_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrent)))
    wall_s = time.perf_counter() - start_s
    told = [answer.denoising_steps for answer in answers if answer.denoising_steps is not None]
    steps = sum(told) if len(told) == len(answers) else None
    return Recorded(concurrent, sum(answer.tokens for answer in answers), steps, wall_s)
