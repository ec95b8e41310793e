"""What is killed when: a pure function of (seed, index)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

Choice = TypeVar("Choice")


class KillKind(StrEnum):
    """What a strike hits."""

    REPLICA = "replica"
    """SIGKILL of a denoiser replica."""
    RANK = "rank"
    """SIGKILL of a rank process beside the replica's own; a replica of one rank has none."""
    ROUTER = "router"
    """SIGKILL of a router."""
    REDIS = "redis"
    """SIGKILL of the Redis server; the cluster's warden starts it again with its data."""
    FREEZE = "freeze"
    """SIGSTOP of a replica for longer than its lease, then SIGCONT: a zombie that writes under an old epoch."""
    DRAIN = "drain"
    """`easel drain` of a replica."""


# Replicas and routers die more often than the rest in production too.
_EXTRA = (KillKind.REPLICA, KillKind.REPLICA, KillKind.ROUTER)
BLOCK = len(KillKind) + len(_EXTRA)


@dataclass(frozen=True, slots=True)
class Strike:
    """One entry of the schedule. `pick` in [0, 1) chooses among what can be hit; `delay_s` lets work begin before.

    `freeze_s` is longer than the default lease of 5 s.
    """

    index: int
    kind: KillKind
    pick: float
    delay_s: float
    freeze_s: float


def draw_strike(seed: int, index: int) -> Strike:
    """Strike `index` of the run with this seed. Every block of BLOCK strikes begins with one of each kind, shuffled."""
    block, place = divmod(index, BLOCK)
    deck = _shuffled(list(KillKind), f"easel chaos {seed} block {block}")
    deck += _shuffled(list(_EXTRA), f"easel chaos {seed} extra {block}")
    rng = random.Random(f"easel chaos {seed} strike {index}")
    return Strike(
        index=index,
        kind=deck[place],
        pick=rng.random(),
        delay_s=rng.uniform(0.05, 0.4),
        freeze_s=rng.uniform(6.5, 8.0),
    )


def pick_one(choices: Sequence[Choice], pick: float) -> Choice:
    """The one of `choices` (not empty) that `pick` in [0, 1) means."""
    return choices[int(pick * len(choices))]


def _shuffled(kinds: list[KillKind], seed: str) -> list[KillKind]:
    random.Random(seed).shuffle(kinds)
    return kinds
