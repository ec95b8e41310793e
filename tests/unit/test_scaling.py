"""The scaling policy: what must hold for every load, and what it decides for some that can be worked out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.policy.holding import Held, hold
from cluster.policy.router_scaling import RouterRules, decide_routers
from cluster.policy.scaling import ScalingRules, ScalingState, Snapshot, decide
from cluster.policy.staffing import LATE_SHARE, Demand, late_share, replicas_for

RULES = ScalingRules(
    min_replicas=1, max_replicas=10, target_wait_s=5.0, scale_down_after_s=60.0, idle_to_zero_after_s=300.0
)
IDLE = Snapshot(
    now_s=0.0,
    queued_jobs=0,
    active_jobs=0,
    canvases_per_job=4.0,
    active_canvases=0.0,
    canvases_per_s=0.0,
    slots=8,
    ready=1,
    starting=0,
    start_s=90.0,
)

amounts = st.one_of(st.just(0.0), st.floats(0, 1e6), st.floats(0, 1e-6))
counts = st.one_of(st.integers(0, 20), st.integers(0, 10**6))


@st.composite
def rules(draw: st.DrawFn) -> ScalingRules:
    least = draw(st.integers(0, 5))
    return ScalingRules(
        min_replicas=least,
        max_replicas=draw(st.integers(max(1, least), 20)),
        target_wait_s=draw(st.floats(0.01, 100)),
        scale_down_after_s=draw(st.floats(0, 100)),
        idle_to_zero_after_s=draw(st.floats(0, 100)),
    )


@st.composite
def snapshots(draw: st.DrawFn, size: int) -> list[Snapshot]:
    """Anything that could be told, at moments that mostly go forward."""
    seen, now_s = [], draw(st.floats(0, 1e9))
    for _ in range(size):
        now_s += draw(st.one_of(st.floats(0, 200), st.just(0.0), st.just(-1.0)))
        seen.append(
            Snapshot(
                now_s=now_s,
                queued_jobs=draw(counts),
                active_jobs=draw(counts),
                canvases_per_job=draw(st.floats(0.01, 1000)),
                active_canvases=draw(amounts),
                canvases_per_s=draw(amounts),
                slots=draw(st.integers(1, 256)),
                ready=draw(st.integers(0, 30)),
                starting=draw(st.integers(0, 30)),
                start_s=draw(amounts),
            )
        )
    return seen


def follow(chosen: ScalingRules, seen: list[Snapshot]) -> tuple[list[int], ScalingState]:
    state, wanted = ScalingState(), []
    for snapshot in seen:
        number, state = decide(chosen, snapshot, state)
        wanted.append(number)
    return wanted, state


@given(rules(), snapshots(size=6))
def test_whatever_is_told_the_number_stays_within_the_bounds(chosen: ScalingRules, seen: list[Snapshot]) -> None:
    wanted, _ = follow(chosen, seen)
    assert all(chosen.min_replicas <= number <= chosen.max_replicas for number in wanted)


@given(rules(), snapshots(size=5), st.integers(1, 1000))
def test_more_jobs_that_wait_never_bring_fewer_replicas(chosen: ScalingRules, seen: list[Snapshot], more: int) -> None:
    _, state = follow(chosen, seen[:-1])
    fewer, _ = decide(chosen, seen[-1], state)
    larger, _ = decide(chosen, replace(seen[-1], queued_jobs=seen[-1].queued_jobs + more), state)
    assert larger >= fewer


@given(rules(), snapshots(size=5))
def test_jobs_that_wait_always_have_a_replica_wanted(chosen: ScalingRules, seen: list[Snapshot]) -> None:
    _, state = follow(chosen, seen[:-1])
    wanted, _ = decide(chosen, replace(seen[-1], queued_jobs=max(1, seen[-1].queued_jobs)), state)
    assert wanted >= 1


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 100.0), st.integers(1, 8))
# Seven replicas make 70 canvases/s: that they are too few shows after minutes, by the queue.
@example(70.25, 1)
@example(71.1, 6)
def test_a_constant_load_is_met_and_replicas_that_went_do_not_come_back(canvases_per_s: float, start: int) -> None:
    """Replicas of 10 canvases/s that are up at once, and a queue of what they did not make yet."""
    current, waiting, wanted = start, 0.0, []
    state = ScalingState()
    for second in range(2000):
        made = min(10.0 * current, canvases_per_s + waiting)
        waiting += canvases_per_s - made
        seen = replace(
            IDLE,
            now_s=float(second),
            ready=current,
            start_s=1.0,
            queued_jobs=round(waiting / 4.0),
            active_jobs=round(0.8 * made),
            active_canvases=0.8 * made,
            canvases_per_s=made,
        )
        current, state = decide(replace(RULES, max_replicas=40), seen, state)
        wanted.append(current)
    settled = wanted[300:]
    peak = settled.index(max(settled))
    assert settled[:peak] == sorted(settled[:peak])
    assert settled[peak:] == sorted(settled[peak:], reverse=True)
    assert 10.0 * current >= canvases_per_s


def test_a_burst_before_anything_was_measured_gets_a_slot_for_every_job() -> None:
    seen = replace(IDLE, queued_jobs=16, active_jobs=8, active_canvases=8.0)
    assert decide(RULES, seen, ScalingState())[0] == 3


def busy(now_s: float, *, ready: int = 1, starting: int = 0, queued: int = 0) -> Snapshot:
    """Full replicas that make 10 canvases/s each."""
    return replace(
        IDLE,
        now_s=now_s,
        ready=ready,
        starting=starting,
        queued_jobs=queued,
        active_jobs=8 * ready,
        active_canvases=8.0 * ready,
        canvases_per_s=10.0 * ready,
    )


KNOWN = ScalingState(
    seen_s=0.0,
    canvases=32.0,
    coming_per_s=2.0,
    quick_per_s=2.0,
    steady_per_s=2.0,
    replica_canvases_per_s=10.0,
    busy_s=0.0,
)


def test_a_queue_that_is_worked_off_before_a_replica_would_be_up_brings_none() -> None:
    """100 jobs of 4 canvases are 40 s of work; a new replica takes 90 s."""
    state = replace(KNOWN, seen_s=1.0, canvases=(100 + 8) * 4.0)
    assert decide(RULES, busy(1.0, queued=100), state)[0] == 1


def test_a_queue_that_is_still_there_when_a_replica_is_up_brings_some() -> None:
    state = replace(KNOWN, seen_s=1.0, canvases=(400 + 8) * 4.0)
    assert decide(RULES, busy(1.0, queued=400), state)[0] > 1


def test_the_same_queue_brings_more_where_replicas_start_fast() -> None:
    state = replace(KNOWN, seen_s=1.0, canvases=(100 + 8) * 4.0)
    assert decide(RULES, replace(busy(1.0, queued=100), start_s=1.0), state)[0] > 1


def test_replicas_that_start_already_are_counted() -> None:
    """2,000 canvases: one replica would need 200 s, three need 67 s, and a fourth would be up after 90 s."""
    state = replace(KNOWN, seen_s=80.0, canvases=2032.0)
    assert decide(RULES, busy(80.0, queued=500), state)[0] > 3
    asked = replace(state, asked_s=0.0)
    assert decide(RULES, busy(80.0, queued=500, starting=2), asked)[0] == 3


def test_replicas_stay_while_the_queue_needs_them() -> None:
    """They would work it off before another one is up; half of them would not."""
    chosen, state = replace(RULES, scale_down_after_s=0.0), replace(KNOWN, seen_s=1.0, canvases=(60 + 24) * 4.0)
    assert decide(chosen, busy(1.0, queued=60, ready=3), state)[0] == 3


def test_fewer_come_only_after_a_stable_period() -> None:
    state, wanted = replace(KNOWN, coming_per_s=0.0), []
    for second in range(1, 125):
        number, state = decide(RULES, replace(IDLE, now_s=float(second), ready=3), state)
        wanted.append(number)
    assert wanted[:60] == [3] * 60
    assert wanted[60:] == [1] * 64


def test_the_last_replica_goes_after_an_idle_time_and_comes_back_for_a_job() -> None:
    chosen = replace(RULES, min_replicas=0)
    _, state = decide(chosen, replace(IDLE, active_jobs=1), ScalingState())
    for now_s, expected in ((100.0, 1), (299.0, 1), (300.0, 0)):
        wanted, state = decide(chosen, replace(IDLE, now_s=now_s), state)
        assert wanted == expected
    assert decide(chosen, replace(IDLE, now_s=301.0, ready=0), state)[0] == 0
    assert decide(chosen, replace(IDLE, now_s=301.0, ready=0, queued_jobs=1), state)[0] == 1


def test_the_time_a_replica_takes_to_come_up_is_measured() -> None:
    wanted, state = decide(RULES, busy(1.0, queued=4000), replace(KNOWN, seen_s=1.0))
    for now_s in (2.0, 50.0):
        _, state = decide(RULES, busy(now_s, queued=4000, starting=wanted - 1), state)
    _, state = decide(RULES, busy(71.0, queued=4000, ready=wanted), state)
    assert state.start_s == pytest.approx(70.0)


def test_a_wish_given_up_before_it_was_fulfilled_measures_nothing() -> None:
    _, state = decide(RULES, busy(1.0, queued=4000), replace(KNOWN, seen_s=1.0))
    _, state = decide(RULES, busy(2.0), state)
    assert (state.start_s, state.asked_s is None) == (None, True)


def test_a_snapshot_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slots 0"):
        replace(IDLE, slots=0)


@given(st.floats(0, 1e5), st.floats(0.01, 1e3), st.floats(0.1, 100), st.integers(1, 64), st.floats(0.1, 60))
def test_staffing_is_the_least_number_that_keeps_its_promise(
    coming: float, speed: float, per_job: float, slots: int, target_s: float
) -> None:
    demand = Demand(coming, speed, per_job)
    number = replicas_for(demand, slots=slots, target_wait_s=target_s, most=50)
    if number < 50:
        assert late_share(demand, number, slots=slots, target_wait_s=target_s) <= LATE_SHARE
    if number > 0:
        assert late_share(demand, number - 1, slots=slots, target_wait_s=target_s) > LATE_SHARE


def test_a_large_cluster_needs_less_headroom_than_a_small_one() -> None:
    small, large = (
        replicas_for(Demand(load, 10.0, 4.0), slots=8, target_wait_s=0.1, most=1000) * 10.0 / load
        for load in (10.0, 1000.0)
    )
    assert large < small


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9)), min_size=1, max_size=40), st.floats(0, 100))
def test_what_is_held_is_the_highest_wish_of_the_period(wishes: list[tuple[float, int]], keep_s: float) -> None:
    held, now_s, made = Held(), 0.0, []
    for passed_s, wish in wishes:
        now_s += passed_s
        made.append((now_s, wish))
        highest, held = hold(held, now_s, wish, keep_s)
        recent = [each for at_s, each in made[:-1] if at_s > now_s - keep_s] + [wish]
        assert highest == (max(recent) if now_s - made[0][0] >= keep_s else None)
        assert len(held.peaks) <= 10


ROUTERS = RouterRules(min_replicas=1, max_replicas=4, scale_down_after_s=60.0, connections_per_router=100)


@pytest.mark.parametrize(("connections", "wanted"), [(0, 1), (100, 1), (101, 2), (10_000, 4)])
def test_routers_come_with_their_connections(connections: int, wanted: int) -> None:
    assert decide_routers(ROUTERS, connections, current=1, now_s=0.0, held=Held())[0] == wanted


def test_routers_go_after_a_stable_period() -> None:
    held, wanted = Held(), []
    for now_s in (0.0, 59.0, 60.0):
        number, held = decide_routers(ROUTERS, 50, current=3, now_s=now_s, held=held)
        wanted.append(number)
    assert wanted == [3, 3, 1]
