"""How many routers there should be, by their open connections. Pure, like cluster/policy/scaling.py."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.policy.holding import Held, hold


@dataclass(frozen=True, slots=True)
class RouterRules:
    """What the operator wants; all but the bounds are above 0."""

    min_replicas: int
    max_replicas: int
    scale_down_after_s: float
    connections_per_router: int


def decide_routers(rules: RouterRules, connections: int, *, current: int, now_s: float, held: Held) -> tuple[int, Held]:
    """The wanted number within the bounds: more at once, fewer after `scale_down_after_s` in which fewer would do."""
    wish = max(rules.min_replicas, min(rules.max_replicas, -(-connections // rules.connections_per_router)))
    stable, held = hold(held, now_s, wish, rules.scale_down_after_s)
    if wish >= current:
        return wish, held
    lower = current if stable is None else min(current, stable)
    return max(rules.min_replicas, min(rules.max_replicas, lower)), held
