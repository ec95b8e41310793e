"""Prompts for the demo checkpoint: the tasks it was trained on, and one that it cannot end."""

from __future__ import annotations

import random
from collections.abc import Callable

_WORDS = ("amber", "tile", "river", "moon", "gate", "quiet", "stone", "lantern", "reef", "cherry", "pear", "apple")
_NAMES = ("Acme Tools", "Silver Fox", "Blue Harbor", "Green Field Works", "Oak and Iron")
_CITIES = ("Oslo", "Lisbon", "Turin", "Graz", "Porto", "Lyon")
# The checkpoint learnt to sort up to 16 digits. Given more it goes on writing up to max_new_tokens.
_TOO_MANY_DIGITS = (40, 60)


def promised_prompt(rng: random.Random) -> str:
    """One of the forms that models/tiny/README.md promises to answer."""
    return rng.choice(_FORMS)(rng)


def endless_prompt(rng: random.Random) -> str:
    """A task far beyond the checkpoint: its answer fills as many canvases as it is given."""
    return f"{rng.choice(('sort', 'reverse'))} {_digits(rng, *_TOO_MANY_DIGITS)}"


def _digits(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices("0123456789", k=rng.randint(low, high)))


def _order(rng: random.Random) -> str:
    day = f"20{rng.randint(20, 35)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return f"Order {rng.randint(100, 9999)} from {rng.choice(_NAMES)} ships to {rng.choice(_CITIES)} on {day}."


def _count(rng: random.Random) -> str:
    first = rng.randint(1, 85)
    return f"count {first} to {first + rng.randint(1, 10)}"


def _words(task: str, low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: f"{task} {' '.join(rng.sample(_WORDS, rng.randint(low, high)))}"


_FORMS: tuple[Callable[[random.Random], str], ...] = (
    _order,
    _count,
    lambda rng: f"reverse {_digits(rng, 3, 8)}",
    lambda rng: f"sort {_digits(rng, 3, 16)}",
    lambda rng: f"add {rng.randint(10, 99)} {rng.randint(10, 99)}",
    lambda rng: f"count down from {rng.randint(60, 95)} by {rng.randint(7, 12)}",
    _words("upper", 2, 8),
    _words("reverse words", 3, 5),
)
