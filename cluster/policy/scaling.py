"""How many replicas there should be. Pure: what is known now and what was decided before go in and come out.

More replicas come at once when jobs would wait longer than the target by the time that a replica asked for now is up:
work that will be done by then needs none. Fewer come only after a stable period, and not fewer than any moment of it
asked for. A clock that jumps back makes that period begin again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from cluster.policy.holding import Held, hold
from cluster.policy.staffing import Demand, replicas_for

# The load that comes is averaged over LONG_S, because a short time shows noise. But what differs in a short time by
# more than noise explains is a change, and counts at once: a burst must be seen long before LONG_S. To take a lull for
# the end of a burst is the dearer mistake, so that less must show for longer, or more clearly.
LONG_S, STEADY_S, QUICK_S = 300.0, 40.0, 10.0
CHANGE_SIGMAS, CLEAR_SIGMAS = 3.0, 6.0
SPEED_S = 60.0


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """What the operator wants. `idle_to_zero_after_s` counts only where `min_replicas` is 0."""

    min_replicas: int
    max_replicas: int
    target_wait_s: float
    scale_down_after_s: float
    idle_to_zero_after_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known at `now_s`, by any clock that goes forward.

    `queued_jobs` and `active_jobs` are of now. `active_canvases` and `canvases_per_s` are of all ready replicas
    together, means over the same last while; 0 when nothing was measured. `canvases_per_job` is what a job is
    expected to ask for, `start_s` what a replica is thought to take to come up. Raises ValueError without slots or
    canvases per job.
    """

    now_s: float
    queued_jobs: int
    active_jobs: int
    canvases_per_job: float
    active_canvases: float
    canvases_per_s: float
    slots: int
    ready: int
    starting: int
    start_s: float

    def __post_init__(self) -> None:
        if self.slots < 1 or self.canvases_per_job <= 0:
            raise ValueError(f"slots {self.slots} and canvases_per_job {self.canvases_per_job} must be above 0")

    @property
    def current(self) -> int:
        """Replicas that serve or start."""
        return self.ready + self.starting


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What one decision leaves to the next.

    `canvases` are those that waited and ran, by what jobs are expected to ask for; from how they grow and from what was
    made follow the canvases/s that come: believed, over QUICK_S and over STEADY_S. `replica_canvases_per_s` is what a
    full replica makes, 0 when that is not known. `asked_s` is when replicas that still start were asked for, and
    `start_s` what that took the last time.
    """

    seen_s: float | None = None
    canvases: float = 0.0
    coming_per_s: float = 0.0
    quick_per_s: float = 0.0
    steady_per_s: float = 0.0
    replica_canvases_per_s: float = 0.0
    busy_s: float | None = None
    asked_s: float | None = None
    ready_when_asked: int = 0
    start_s: float | None = None
    held: Held = field(default_factory=Held)


def decide(rules: ScalingRules, seen: Snapshot, state: ScalingState) -> tuple[int, ScalingState]:
    """The wanted number of replicas, within the bounds of `rules`, and the state for the next decision."""
    if state.seen_s is not None and seen.now_s < state.seen_s:
        state = replace(state, seen_s=None, busy_s=None, asked_s=None, held=Held())
    state = _started(seen, _measured(seen, state))
    wish = _within(rules, max(1, needed(rules, seen, state)))
    stable, held = hold(state.held, seen.now_s, wish, rules.scale_down_after_s)
    state = replace(state, held=held)
    if _may_rest(rules, seen, state):
        return 0, state
    wanted = wish
    if wish < seen.current:
        wanted = seen.current if stable is None else min(seen.current, stable)
    if wanted > seen.current and state.asked_s is None:
        state = replace(state, asked_s=seen.now_s, ready_when_asked=seen.ready)
    return _within(rules, wanted), state


def needed(rules: ScalingRules, seen: Snapshot, state: ScalingState) -> int:
    """Replicas for the load as it is: those it needs to go on, and those that work off a queue that is too long."""
    speed = state.replica_canvases_per_s
    if speed <= 0:
        # Nothing is known of their speed: a slot for every job.
        return math.ceil((seen.queued_jobs + seen.active_jobs) / seen.slots)
    demand = Demand(state.coming_per_s, speed, seen.canvases_per_job)
    steady = replicas_for(demand, slots=seen.slots, target_wait_s=rules.target_wait_s, most=rules.max_replicas)
    return max(steady, _against_the_queue(rules, seen, state))


def _against_the_queue(rules: ScalingRules, seen: Snapshot, state: ScalingState) -> int:
    """Replicas that work off the queue in time: those there are as long as it needs them, more if they will not do.

    They will do when what is left as one asked for now is up, and what a job that comes then would wait for, is within
    the target: what waits and comes until then, less what those that are there and those that start will have made.
    """
    speed, up_in_s = state.replica_canvases_per_s, _start_s(seen, state)
    asked_s = seen.now_s if state.asked_s is None else state.asked_s
    others_up_in_s = max(0.0, up_in_s - (seen.now_s - asked_s))
    worked_s = seen.ready * up_in_s + seen.starting * (up_in_s - others_up_in_s)
    queued = seen.queued_jobs * seen.canvases_per_job
    left = queued + state.coming_per_s * up_in_s - speed * worked_s
    kept = min(seen.current, _within_target(queued, rules, seen, state))
    if left <= rules.target_wait_s * speed * max(1, seen.current):
        return kept
    return max(kept, _within_target(left, rules, seen, state))


def _within_target(canvases: float, rules: ScalingRules, seen: Snapshot, state: ScalingState) -> int:
    """Replicas that make so many canvases within the target beside those that come."""
    speed = state.replica_canvases_per_s
    wanted = (state.coming_per_s + canvases / rules.target_wait_s) / speed
    # More than a slot for every job that is here serves nobody, unless they keep coming.
    slots_for_all = (seen.queued_jobs + seen.active_jobs) / seen.slots
    return math.ceil(min(rules.max_replicas, wanted, max(slots_for_all, state.coming_per_s / speed)))


def _measured(seen: Snapshot, state: ScalingState) -> ScalingState:
    """Bring the averages up to now: the load that comes, and the speed of a full replica."""
    passed_s = 0.0 if state.seen_s is None else seen.now_s - state.seen_s
    busy = seen.queued_jobs > 0 or seen.active_jobs > 0
    new = replace(
        state,
        seen_s=seen.now_s,
        canvases=(seen.queued_jobs + seen.active_jobs) * seen.canvases_per_job,
        replica_canvases_per_s=_full_speed(seen, state, _share(passed_s, SPEED_S)),
        busy_s=seen.now_s if busy or state.busy_s is None else state.busy_s,
    )
    if state.seen_s is None:
        made = seen.canvases_per_s
        return replace(new, coming_per_s=made, quick_per_s=made, steady_per_s=made)
    return _averaged(new, state, seen, passed_s) if passed_s > 0 else state


def _averaged(new: ScalingState, state: ScalingState, seen: Snapshot, passed_s: float) -> ScalingState:
    """What comes is what was made and by what the rest has grown; both are measured apart, so it can be below 0."""
    coming = seen.canvases_per_s + (new.canvases - state.canvases) / passed_s
    quick = _towards(coming, state.quick_per_s, passed_s, QUICK_S)
    steady = _towards(coming, state.steady_per_s, passed_s, STEADY_S)
    believed = max(0.0, _towards(coming, state.coming_per_s, passed_s, LONG_S))
    before, per_job = state.coming_per_s, seen.canvases_per_job
    if _sigmas(quick, before, per_job, QUICK_S) > CHANGE_SIGMAS:
        believed, steady = max(believed, quick), max(steady, quick)
    else:
        if _sigmas(steady, before, per_job, STEADY_S) < -CHANGE_SIGMAS:
            believed = min(believed, max(0.0, steady))
        if _sigmas(quick, before, per_job, QUICK_S) < -CLEAR_SIGMAS:
            believed, steady = min(believed, max(0.0, quick)), min(steady, quick)
    return replace(new, coming_per_s=believed, quick_per_s=quick, steady_per_s=steady)


def _full_speed(seen: Snapshot, state: ScalingState, share: float) -> float:
    """Canvases/s of a replica with all slots taken, from what the ready ones make with a part of them.

    A wider batch makes more in all and less for each, so that with a part b of the slots taken a full replica makes
    between 1 and 1/b times as much. What was known stays as long as it lies between; the first guess is the geometric
    mean of the two.
    """
    taken = min(1.0, seen.active_canvases / (seen.slots * seen.ready)) if seen.ready else 0.0
    known, made = state.replica_canvases_per_s, seen.canvases_per_s / max(1, seen.ready)
    if taken <= 0 or made <= 0:
        return known
    if known <= 0:
        return made / math.sqrt(taken)
    return known + share * (min(max(known, made), made / taken) - known)


def _sigmas(short_per_s: float, long_per_s: float, canvases_per_job: float, over_s: float) -> float:
    """How far a mean over a short time lies above one over a long time, in standard deviations of the short one.

    Jobs come by chance (Poisson), and their canvases vary as much as their mean; the root of a count of n jobs has a
    standard deviation of 1/2, whatever n (Bartlett 1936), also where n is small.
    """
    jobs = over_s / canvases_per_job
    return 2 * (math.sqrt(max(0.0, short_per_s) * jobs) - math.sqrt(long_per_s * jobs))


def _share(passed_s: float, over_s: float) -> float:
    return 1 - math.exp(-passed_s / over_s)


def _towards(value: float, mean: float, passed_s: float, over_s: float) -> float:
    return mean + _share(passed_s, over_s) * (value - mean)


def _started(seen: Snapshot, state: ScalingState) -> ScalingState:
    """Take the time from a wish for more until all that were asked for are ready."""
    if seen.starting > 0:
        if state.asked_s is not None:
            return state
        return replace(state, asked_s=seen.now_s, ready_when_asked=seen.ready)
    if state.asked_s is None or seen.ready <= state.ready_when_asked:
        return replace(state, asked_s=None)
    return replace(state, asked_s=None, start_s=seen.now_s - state.asked_s)


def _start_s(seen: Snapshot, state: ScalingState) -> float:
    known_s = max(0.0, seen.start_s) if state.start_s is None else state.start_s
    waiting_s = 0.0 if state.asked_s is None else seen.now_s - state.asked_s
    return max(known_s, waiting_s)


def _within(rules: ScalingRules, wanted: int) -> int:
    return max(rules.min_replicas, min(rules.max_replicas, wanted))


def _may_rest(rules: ScalingRules, seen: Snapshot, state: ScalingState) -> bool:
    """True when no replica need be there: none is asked for, or nothing has been to do for long enough."""
    if rules.min_replicas > 0 or seen.queued_jobs > 0:
        return False
    idle_s = seen.now_s - (seen.now_s if state.busy_s is None else state.busy_s)
    return seen.ready + seen.starting == 0 or idle_s >= rules.idle_to_zero_after_s
