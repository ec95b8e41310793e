"""The order of the queue: level, then deadline, then arrival.

The queue is a sorted set in which every score is 0, so Redis orders it by the bytes of its members. A member
is

    <9 - level>:<deadline, ms>:<arrival sequence>:<job id>

with both numbers zero-padded to 16 digits. lua/lib/queue.lua builds the same bytes.

A job's level is its priority when it arrives. For every `aging_ms` that it waits it gains one level, up to
OLDEST, which is above the most urgent priority: under any mix of arrivals every job comes to the front, for
those above it are only jobs that have waited long themselves. A level is a place in the queue and no more: it
never takes a slot from a running job. It is kept when a job comes back to the queue, but for a job that gave way
to a more urgent one: that starts again from its priority, or it would be ahead of the one it made room for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.core import Priority

# Lua numbers are doubles: 2^53 - 1 is the largest whole number that both sides hold exactly.
NO_DEADLINE_MS = 2**53 - 1
OLDEST = max(Priority) + 1


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A waiting job as its queue member says it; `deadline_ms` is None when the job may wait for ever."""

    level: int
    deadline_ms: int | None
    sequence: int
    job_id: str

    def aged(self) -> QueueEntry:
        """The entry after one more `aging_ms` of waiting."""
        return replace(self, level=min(self.level + 1, OLDEST))


def queue_member(entry: QueueEntry) -> str:
    """The member for `entry`; of two members the smaller string is served first.

    Raises ValueError for a deadline or a sequence outside [0, 2^53 - 1], or a level outside [1, OLDEST].
    """
    deadline_ms = NO_DEADLINE_MS if entry.deadline_ms is None else entry.deadline_ms
    for name, value in (("deadline_ms", deadline_ms), ("sequence", entry.sequence)):
        if not 0 <= value <= NO_DEADLINE_MS:
            raise ValueError(f"{name} is {value}; it must lie in [0, {NO_DEADLINE_MS}]")
    if not 1 <= entry.level <= OLDEST:
        raise ValueError(f"level is {entry.level}; it must lie in [1, {OLDEST}]")
    return f"{9 - entry.level}:{deadline_ms:016d}:{entry.sequence:016d}:{entry.job_id}"


def members_of_level(level: int) -> tuple[str, str]:
    """The bounds, for ZRANGEBYLEX and its like, of all members of a level."""
    return f"[{9 - level}:", f"({9 - level};"  # ";" comes next after ":"


def parse_member(member: str) -> QueueEntry:
    """What `member` says; the inverse of `queue_member`. Raises ValueError for any other string."""
    parts = member.split(":", 3)
    if len(parts) != 4 or [len(p) for p in parts[:3]] != [1, 16, 16]:
        raise ValueError(f"not a queue member: {member!r}")
    deadline_ms = int(parts[1])
    return QueueEntry(
        level=9 - int(parts[0]),
        deadline_ms=None if deadline_ms == NO_DEADLINE_MS else deadline_ms,
        sequence=int(parts[2]),
        job_id=parts[3],
    )
