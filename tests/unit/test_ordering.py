"""Queue members order as the policy says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import Priority
from cluster.policy.ordering import NO_DEADLINE_MS, OLDEST, QueueEntry, parse_member, queue_member

whole = st.integers(0, NO_DEADLINE_MS - 1)
entries = st.builds(
    QueueEntry,
    level=st.integers(1, OLDEST),
    deadline_ms=st.none() | whole,
    sequence=whole,
    job_id=st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=20),
)


def policy(entry: QueueEntry) -> tuple[int, float, int]:
    deadline = float("inf") if entry.deadline_ms is None else entry.deadline_ms
    return (-entry.level, deadline, entry.sequence)


@given(entries, entries)
def test_bytes_order_as_level_then_deadline_then_arrival(a: QueueEntry, b: QueueEntry) -> None:
    if policy(a) != policy(b):
        assert (queue_member(a).encode() < queue_member(b).encode()) == (policy(a) < policy(b))


@given(entries)
def test_a_member_says_all_of_its_entry(entry: QueueEntry) -> None:
    assert parse_member(queue_member(entry)) == entry


@pytest.mark.parametrize("member", ["", "job", "5:1:2:job", "x:" + "0" * 16 + ":" + "0" * 16 + ":job"])
def test_other_strings_are_no_members(member: str) -> None:
    with pytest.raises(ValueError, match=r"member|invalid literal"):
        parse_member(member)


def test_waiting_raises_a_level_up_to_one_above_the_most_urgent_priority() -> None:
    entry = QueueEntry(Priority.BATCH, None, 7, "job")
    levels = []
    for _ in range(6):
        entry = entry.aged()
        levels.append(entry.level)
    assert levels == [2, 3, 4, OLDEST, OLDEST, OLDEST]
    assert max(Priority) < OLDEST
    assert (entry.deadline_ms, entry.sequence, entry.job_id) == (None, 7, "job")


@pytest.mark.parametrize("level", [0, OLDEST + 1])
def test_a_level_that_there_is_not_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=f"level is {level}; it must lie in"):
        queue_member(QueueEntry(level, None, 1, "job"))


def test_a_number_that_lua_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sequence is 9007199254740992"):
        queue_member(QueueEntry(Priority.NORMAL, None, 2**53, "job"))
