"""The policies that Serve runs in its controller; it makes one object of a class for a deployment, and calls it.

Serve sends these classes to its controller whole, so the module holds little: what they decide is in cluster/policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.policy.holding import Held
from cluster.policy.router_scaling import RouterRules, decide_routers
from cluster.policy.scaling import ScalingRules, ScalingState, Snapshot, decide

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

STATE = "easel"
# Numbers older than this tell nothing of now: whoever sent them hangs, or is gone.
STALE_AFTER_S = 30.0

# By replica, what it said last.
Numbers = list[Mapping[str, float]]


class DenoiserPolicy:
    """How many denoiser replicas Serve is to run; the arguments are those of cluster.config.DenoiserAutoscaling."""

    def __init__(self, *, start_s: float, **rules: Any) -> None:  # noqa: ANN401 - the fields of ScalingRules
        self._rules = ScalingRules(**rules)
        self._start_s = start_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The wanted number, and the state that Serve hands to the next call."""
        said = latest(context, "slots")
        if not said:
            # Nobody to ask: none is up, or none yet. A router wakes the first one, see deployments/scaling.py.
            return context.target_num_replicas, dict(context.policy_state)
        seen = self._snapshot(context, said)
        wanted, state = decide(self._rules, seen, context.policy_state.get(STATE, ScalingState()))
        return wanted, {STATE: state}

    def _snapshot(self, context: AutoscalingContext, said: Numbers) -> Snapshot:
        ready = context.current_num_replicas
        per_job = [numbers["canvases_per_job"] for numbers in said if numbers["canvases_per_job"] > 0]
        return Snapshot(
            now_s=float(context.current_time or 0.0),
            queued_jobs=int(max(said, key=lambda numbers: numbers["at_s"])["queued_jobs"]),
            canvases_per_job=sum(per_job) / len(per_job) if per_job else 1.0,
            active_jobs=int(sum(numbers["active_jobs"] for numbers in said)),
            active_canvases=sum(numbers["active_canvases"] for numbers in said),
            canvases_per_s=sum(numbers["canvases_per_s"] for numbers in said),
            slots=int(max(numbers["slots"] for numbers in said)),
            ready=ready,
            starting=max(0, context.target_num_replicas - ready),
            start_s=max(self._start_s, *(numbers["start_s"] for numbers in said)),
        )


class RouterPolicy:
    """How many routers Serve is to run; the arguments are those of cluster.config.RouterAutoscaling."""

    def __init__(self, **rules: Any) -> None:  # noqa: ANN401 - the fields of RouterRules
        self._rules = RouterRules(**rules)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """As DenoiserPolicy."""
        said = latest(context, "connections")
        if not said:
            return context.target_num_replicas, dict(context.policy_state)
        now_s, current = float(context.current_time or 0.0), context.target_num_replicas
        connections = int(sum(numbers["connections"] for numbers in said))
        held = context.policy_state.get(STATE, Held())
        wanted, held = decide_routers(self._rules, connections, current=current, now_s=now_s, held=held)
        return wanted, {STATE: held}


def latest(context: AutoscalingContext, known: str) -> Numbers:
    """What each replica said last, with `at_s`, when it did; those that did not say `known` lately are left out."""
    now_s = float(context.current_time or 0.0)
    by_replica: dict[Any, dict[str, float]] = {}
    for name, series in (context.raw_metrics or {}).items():
        for replica, points in series.items():
            if points and now_s - points[-1].timestamp <= STALE_AFTER_S:
                numbers = by_replica.setdefault(replica, {})
                numbers[name], numbers["at_s"] = points[-1].value, points[-1].timestamp
    return [numbers for numbers in by_replica.values() if known in numbers]
