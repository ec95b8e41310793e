"""A request's sampling parameters: their limits, and the model's defaults for what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.core import ModelCard, SamplingParams, Violation
from cluster.rpc.easel.v1 import generation_pb2


@dataclass(frozen=True, slots=True)
class Limit:
    """What a field may be: from `low` (or above it) up to `high`."""

    name: str
    low: float
    high: float
    above_low: bool

    def allows(self, value: float) -> bool:
        """False for NaN too, which compares as false with everything."""
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"above {self.low:g} up to {self.high:g}" if self.above_low else f"{self.low:g} to {self.high:g}"


LIMITS = (
    Limit("max_denoising_steps", 1, 1000, above_low=False),
    Limit("entropy_bound", 0, 1000, above_low=True),
    Limit("t_min", 0, 100, above_low=True),
    Limit("t_max", 0, 100, above_low=True),
    Limit("confidence_threshold", 0, 1000, above_low=True),
    Limit("stability_threshold", 0, 100, above_low=False),
)


def shown(value: object) -> str:
    """A value as an error message shows it: quoted, and short."""
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:44]}..."


def room_tokens(card: ModelCard, prompt_tokens: int) -> int:
    """Most new tokens that fit behind a prompt: whole canvases, for a canvas is denoised whole. Can be below
    0.
    """
    return (card.max_context_tokens - prompt_tokens) // card.canvas_tokens * card.canvas_tokens


def resolve_sampling(
    given: generation_pb2.SamplingParams,
    card: ModelCard,
    prompt_tokens: int,
    new_seed: Callable[[], int],
    bad: list[Violation],
) -> SamplingParams | None:
    """Check what is given and take the rest from the model; None with reasons added to `bad` when a value is
    wrong.

    The model's own max_new_tokens is cut to the room behind the prompt, in whole canvases; a caller's is not.
    """
    values: dict[str, Any] = {field.name: value for field, value in given.ListFields() if field.name != "stop"}
    problems = [*_out_of_range(values), *_crossed_temperatures(values, card)]
    problems += _bad_length(values.get("max_new_tokens"), card, prompt_tokens)
    if problems:
        bad.extend(problems)
        return None
    room = max(room_tokens(card, prompt_tokens), card.canvas_tokens)
    values.setdefault("max_new_tokens", min(card.defaults.max_new_tokens, room))
    if "seed" not in values:
        values["seed"] = new_seed()
    return replace(card.defaults, **values)


def _out_of_range(values: Mapping[str, float]) -> Iterator[Violation]:
    for limit in LIMITS:
        if limit.name in values and not limit.allows(values[limit.name]):
            allowed = "t_min to 100" if limit.name == "t_max" else str(limit)
            yield Violation(f"sampling.{limit.name}", f"is {values[limit.name]:g}; allowed is {allowed}")


def _crossed_temperatures(values: Mapping[str, float], card: ModelCard) -> Iterator[Violation]:
    t_min = values.get("t_min", card.defaults.t_min)
    t_max = values.get("t_max", card.defaults.t_max)
    if not 0 < t_max < t_min <= 100:
        return
    if "t_max" in values:
        yield Violation("sampling.t_max", f"is {t_max:g}; allowed is t_min, here {t_min:g}, to 100")
    else:
        what = f"is {t_min:g}; allowed is above 0 up to t_max, by the model's default {t_max:g}: set t_max too"
        yield Violation("sampling.t_min", what)


def _bad_length(max_new_tokens: int | None, card: ModelCard, prompt_tokens: int) -> Iterator[Violation]:
    room = room_tokens(card, prompt_tokens)
    if max_new_tokens is None or 1 <= max_new_tokens <= room:
        return
    what = f"is {max_new_tokens}; allowed is 1 to {room}"
    if max_new_tokens > room and prompt_tokens:
        what += f": the context holds {card.max_context_tokens} tokens and the prompt has {prompt_tokens}"
    yield Violation("sampling.max_new_tokens", what)
