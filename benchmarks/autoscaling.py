"""What scaling on canvases costs against Serve's own policy, in simulated days: replica-hours at an equal 95% wait.

python -m benchmarks.autoscaling [--days N] [--seed N]

Both policies see the same jobs and replicas (benchmarks/simulated.py), are asked once a second, and have fresh numbers.
Serve's is Ray's code: its policy on ongoing requests, its scaling factors, its delays. Its target_ongoing_requests is
swept, first with Ray's own delays and then with others as well, and its cheapest setting that waits no longer than ours
counts. Ours runs with several targets and two scale_down_after_s. The policy was made on other days than those of the
default seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors, default_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.simulated import SLOTS, Policy, Sight, Simulation, Traffic, day
from cluster.config import DenoiserAutoscaling
from cluster.policy.scaling import ScalingRules, ScalingState, Snapshot, decide

MOST = 16
START_S = 90.0
JOBS_PER_S = 5.0
CANVASES_PER_JOB, STEPS_PER_CANVAS = 4.0, 26.6
TARGETS_S = (1.0, 2.0, 5.0, 10.0)
DOWN_AFTER_S = (120.0, 60.0)
ONGOING = (2.5, 3.0, 3.5, 4.0, 4.5)
# Ray's own delays for more and for fewer replicas, and others.
RAYS_DELAYS_S = (30.0, 600.0)
DELAYS_S = ((0.0, 60.0), (0.0, 120.0), (0.0, 300.0), (30.0, 60.0), (30.0, 120.0), (30.0, 300.0))


class OnCanvases:
    """Ours, with the numbers that replicas would tell."""

    def __init__(self, target_wait_s: float, down_after_s: float) -> None:
        chosen = DenoiserAutoscaling(max_replicas=MOST, target_wait_s=target_wait_s, scale_down_after_s=down_after_s)
        self._rules = ScalingRules(**chosen.model_dump(exclude={"start_s"}))
        self._state = ScalingState()

    def __call__(self, sight: Sight) -> int:
        seen = Snapshot(
            now_s=sight.now_s,
            queued_jobs=sight.queued,
            active_jobs=sight.active,
            canvases_per_job=CANVASES_PER_JOB,
            active_canvases=sight.active_mean,
            canvases_per_s=sight.steps_per_s / STEPS_PER_CANVAS,
            slots=SLOTS,
            ready=sight.ready,
            starting=sight.starting,
            start_s=START_S,
        )
        wanted, self._state = decide(self._rules, seen, self._state)
        return wanted


class OnOngoingRequests:
    """Serve's, put together as Serve does: the policy, the factors, the delays, the bounds."""

    def __init__(self, ongoing: float, up_after_s: float, down_after_s: float) -> None:
        self._config = AutoscalingConfig(
            max_replicas=MOST,
            target_ongoing_requests=ongoing,
            upscale_delay_s=up_after_s,
            downscale_delay_s=down_after_s,
        )
        self._state: dict[str, Any] = {}

    def __call__(self, sight: Sight) -> int:
        current = sight.ready + sight.starting
        context = SimpleNamespace(
            current_num_replicas=sight.ready,
            target_num_replicas=current,
            total_num_requests=sight.ongoing_mean,
            config=self._config,
            policy_state=self._state,
        )
        wanted, _ = default_autoscaling_policy(cast(AutoscalingContext, context))
        scaled = _apply_scaling_factors(wanted, sight.ready, self._config)
        decided, self._state = _apply_delay_logic(max(0, scaled), current, self._config, self._state, _now=sight.now_s)
        return max(1, min(MOST, decided))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A setting over all days: replica-hours, and waits for a slot and latencies of all jobs."""

    name: str
    replica_hours: float
    wait_p95_s: float
    wait_p99_s: float
    latency_p95_s: float
    changes: int

    def __str__(self) -> str:
        waits = f"wait p95 {self.wait_p95_s:6.2f} s  p99 {self.wait_p99_s:6.2f} s"
        return (
            f"{self.name:34s} {self.replica_hours:7.1f} replica-hours  {waits}  "
            f"latency p95 {self.latency_p95_s:6.2f} s  {self.changes} changes"
        )


def outcome(name: str, days: Sequence[Traffic], policies: Iterable[Policy]) -> Outcome:
    """Run each day with a fresh policy of its own."""
    done = [
        Simulation(traffic, policy, start_s=START_S, replicas=2).run()
        for traffic, policy in zip(days, policies, strict=True)
    ]
    waits, latencies = (
        np.concatenate(parts) for parts in zip(*((d.waits_s, d.latencies_s) for d in done), strict=True)
    )
    return Outcome(
        name,
        sum(each.replica_hours for each in done),
        float(np.percentile(waits, 95)),
        float(np.percentile(waits, 99)),
        float(np.percentile(latencies, 95)),
        sum(each.changes for each in done),
    )


def cheapest(outcomes: Iterable[Outcome], wait_p95_s: float) -> Outcome | None:
    """Of those that wait no longer; None when all do."""
    good = [each for each in outcomes if each.wait_p95_s <= wait_p95_s]
    return min(good, key=lambda each: each.replica_hours, default=None)


def serve_outcomes(days: Sequence[Traffic], delays_s: Iterable[tuple[float, float]]) -> list[Outcome]:
    """Serve's policy with every target and these delays; prints each."""
    made = []
    for up_s, down_s in delays_s:
        for ongoing in ONGOING:
            name = f"serve: {ongoing} ongoing, up {up_s:.0f} s, down {down_s:.0f} s"
            made.append(outcome(name, days, [OnOngoingRequests(ongoing, up_s, down_s) for _ in days]))
            print(made[-1], flush=True)
    return made


def main() -> None:
    """Print every setting, then for each of ours what Serve's cheapest as good one costs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--days", type=int, default=2)
    parser.add_argument("--seed", type=int, default=21)
    asked = parser.parse_args()
    days = [day(asked.seed + n, hours=24, jobs_per_s=JOBS_PER_S) for n in range(asked.days)]
    ours = our_outcomes(days)
    with_rays = serve_outcomes(days, [RAYS_DELAYS_S])
    with_others = with_rays + serve_outcomes(days, DELAYS_S)
    ratios: dict[str, float] = {}
    for mine in ours:
        for name, others in (("Ray's delays", with_rays), ("its delays swept too", with_others)):
            best = cheapest(others, mine.wait_p95_s)
            if best is not None:
                ratio = mine.replica_hours / best.replica_hours
                ratios[f"{mine.name} / serve, {name}"] = round(ratio, 3)
                print(f"{mine.name}: {ratio:.2f} of the replica-hours of [{best.name}] ({name})")
    print(json.dumps({"replica_hours_at_equal_wait_p95": ratios}))


def our_outcomes(days: Sequence[Traffic]) -> list[Outcome]:
    """Ours with every target and delay; prints each."""
    made = []
    for down_s in DOWN_AFTER_S:
        for target_s in TARGETS_S:
            name = f"canvases: wait {target_s:.0f} s, down {down_s:.0f} s"
            made.append(outcome(name, days, [OnCanvases(target_s, down_s) for _ in days]))
            print(made[-1], flush=True)
    return made


if __name__ == "__main__":
    main()
