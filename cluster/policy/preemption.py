"""Who gives way to whom. lua/lib/preempt.lua decides by the same rules, inside Redis.

A running job may give way to a waiting one of a higher *priority* (waiting long does not help here: it only moves a
job forward in the queue). The victim is the running job of the lowest priority, and of those the youngest. One that has
given way `max_preemptions` times is no victim any more. As many victims are marked as slots are needed: a mark stands
for a slot on its way, and goes to the head of the queue.

Redis leaves out what this cannot see: victims whose slot nobody could use (their replica drains, is not heard, or
runs a job on its last chance), and waiting jobs on their last chance where they could not run (lua/lib/apart.lua).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core import Priority
from cluster.policy.ordering import NO_DEADLINE_MS


@dataclass(frozen=True, slots=True)
class Runner:
    """A running job; `turn` rises with every assignment, so the greatest is the youngest."""

    job_id: str
    priority: Priority
    turn: int
    preemptions: int = 0


def victim_member(runner: Runner) -> str:
    """The member for `runner` in the sorted set of victims: of two the smaller string gives way first."""
    return f"{runner.priority}:{NO_DEADLINE_MS - runner.turn:016d}:{runner.job_id}"


def choose_victims(
    waiting: Sequence[Priority], running: Sequence[Runner], *, marks: int, max_preemptions: int
) -> list[Runner]:
    """The running jobs to mark, in order.

    `waiting` are the priorities of the queue, its head first; `marks` is how many victims were told and still run.
    """
    candidates = sorted((r for r in running if r.preemptions < max_preemptions), key=victim_member)
    chosen: list[Runner] = []
    for victim in candidates:
        unserved = waiting[marks + len(chosen) :]
        if not any(priority > victim.priority for priority in unserved[:LOOKED_AT]):
            break
        chosen.append(victim)
    return chosen[:LOOKED_AT]


# Redis looks at no more waiting jobs, and marks no more victims, in one script.
LOOKED_AT = 8
