"""Who gives way to whom, as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import Priority
from cluster.policy.preemption import LOOKED_AT, Runner, choose_victims, victim_member

BATCH, NORMAL, HIGH, URGENT = Priority
priorities = st.sampled_from(Priority)
turns = st.integers(1, 2**53 - 1)
runners = st.lists(
    st.builds(Runner, st.uuids().map(str), priorities, turns, st.integers(0, 3)),
    max_size=20,
    unique_by=lambda r: r.turn,
)


def victims(waiting: list[Priority], running: list[Runner], *, marks: int = 0, max_preemptions: int = 3) -> list[str]:
    chosen = choose_victims(waiting, running, marks=marks, max_preemptions=max_preemptions)
    return [runner.job_id for runner in chosen]


def test_the_victim_is_of_the_lowest_priority_and_of_those_the_youngest() -> None:
    running = [Runner("old", BATCH, 1), Runner("young", BATCH, 9), Runner("normal", NORMAL, 10)]
    assert victims([URGENT], running) == ["young"]
    assert victims([URGENT] * 3, running) == ["young", "old", "normal"]


@pytest.mark.parametrize("priority", Priority)
def test_nobody_gives_way_to_an_equal(priority: Priority) -> None:
    assert victims([priority], [Runner("job", priority, 1)]) == []


def test_a_job_gives_way_only_so_often() -> None:
    running = [Runner("spared", BATCH, 2, preemptions=3), Runner("other", NORMAL, 1, preemptions=2)]
    assert victims([URGENT, URGENT], running) == ["other"]
    assert victims([URGENT], running, max_preemptions=0) == []


def test_a_mark_stands_for_a_slot_on_its_way() -> None:
    running = [Runner("one", BATCH, 1), Runner("two", BATCH, 2)]
    assert victims([URGENT], running, marks=1) == []
    assert victims([URGENT, URGENT], running, marks=1) == ["two"]


def test_the_slot_goes_to_the_head_of_the_queue_so_one_more_is_marked_for_who_is_behind_it() -> None:
    running = [Runner("one", BATCH, 1), Runner("two", BATCH, 2)]
    assert victims([BATCH, URGENT], running) == ["two", "one"]


@given(st.lists(priorities, max_size=20), runners, st.integers(0, 5))
def test_every_victim_is_worth_its_mark(waiting: list[Priority], running: list[Runner], marks: int) -> None:
    chosen = choose_victims(waiting, running, marks=marks, max_preemptions=3)
    assert len(chosen) <= min(LOOKED_AT, max(0, len(waiting) - marks))
    for runner in chosen:
        assert runner.preemptions < 3
        assert max(waiting) > runner.priority
    spared = [r for r in running if r.preemptions < 3 and r not in chosen]
    assert all((c.priority, -c.turn) < (s.priority, -s.turn) for c in chosen for s in spared)


@given(runners)
def test_bytes_order_as_priority_then_youth(running: list[Runner]) -> None:
    by_bytes = sorted(running, key=lambda r: victim_member(r).encode())
    assert by_bytes == sorted(running, key=lambda r: (r.priority, -r.turn))
