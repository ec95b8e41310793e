"""The order of the queue: priority, then deadline, then arrival.

The queue is a sorted set in which every score is 0, so Redis orders it by the bytes of its members. A member
is

    <9 - priority>:<deadline, ms>:<arrival sequence>:<job id>

with both numbers zero-padded to 16 digits. lua/lib/queue.lua builds the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core import Priority

# Lua numbers are doubles: 2^53 - 1 is the largest whole number that both sides hold exactly.
NO_DEADLINE_MS = 2**53 - 1


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A waiting job as its queue member says it; `deadline_ms` is None when the job may wait for ever."""

    priority: Priority
    deadline_ms: int | None
    sequence: int
    job_id: str


def queue_member(entry: QueueEntry) -> str:
    """The member for `entry`; of two members the smaller string is served first.

    Raises ValueError for a deadline or a sequence outside [0, 2^53 - 1].
    """
    deadline_ms = NO_DEADLINE_MS if entry.deadline_ms is None else entry.deadline_ms
    for name, value in (("deadline_ms", deadline_ms), ("sequence", entry.sequence)):
        if not 0 <= value <= NO_DEADLINE_MS:
            raise ValueError(f"{name} is {value}; it must lie in [0, {NO_DEADLINE_MS}]")
    return f"{9 - entry.priority}:{deadline_ms:016d}:{entry.sequence:016d}:{entry.job_id}"


def parse_member(member: str) -> QueueEntry:
    """What `member` says; the inverse of `queue_member`. Raises ValueError for any other string."""
    parts = member.split(":", 3)
    if len(parts) != 4 or [len(p) for p in parts[:3]] != [1, 16, 16]:
        raise ValueError(f"not a queue member: {member!r}")
    deadline_ms = int(parts[1])
    return QueueEntry(
        priority=Priority(9 - int(parts[0])),
        deadline_ms=None if deadline_ms == NO_DEADLINE_MS else deadline_ms,
        sequence=int(parts[2]),
        job_id=parts[3],
    )
