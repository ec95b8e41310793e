"""The simulator behind benchmarks/autoscaling.py: its jobs and its time add up. Its figures are the benchmark's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from benchmarks.simulated import SLOTS, STEP_S, Policy, Sight, Simulation, Traffic, day, steps_per_canvas

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray.serve uses pydantic in a way that pydantic warns of
    from benchmarks.autoscaling import CANVASES_PER_JOB, START_S, STEPS_PER_CANVAS, OnCanvases, OnOngoingRequests


def test_steps_per_canvas_have_the_published_moments() -> None:
    steps = steps_per_canvas(np.random.default_rng(1), 200_000)
    assert steps.mean() == pytest.approx(STEPS_PER_CANVAS, abs=0.2)
    assert (np.median(steps), np.percentile(steps, 10), np.percentile(steps, 90)) == (23, 10, 48)
    assert (steps == 48).mean() == pytest.approx(0.21, abs=0.005)


def test_a_day_is_the_same_for_the_same_seed_and_has_the_load_asked_for() -> None:
    first, again = (day(3, hours=2.0, jobs_per_s=1.0) for _ in range(2))
    assert first == again
    assert first.at_s == sorted(first.at_s)
    assert np.mean(first.canvases) == pytest.approx(CANVASES_PER_JOB, rel=0.1)


@pytest.mark.parametrize(
    "policy", [OnCanvases(2.0, 60.0), OnOngoingRequests(4.0, 30.0, 60.0)], ids=["canvases", "serve"]
)
def test_every_job_ends_once_and_none_before_its_work_is_done(policy: Policy) -> None:
    traffic = day(5, hours=0.5, jobs_per_s=4.0)
    done = Simulation(traffic, policy, start_s=START_S, replicas=2).run()
    assert (done.finished, done.left) == (len(traffic.at_s), 0)
    assert (done.waits_s >= 0).all()
    least_s = np.asarray(traffic.steps) * STEP_S[1]
    assert (done.latencies_s - done.waits_s >= least_s - 1e-6).all()
    assert done.replica_hours >= 0.5


def test_a_replica_that_goes_gives_its_jobs_back_with_their_progress() -> None:
    """One job of 1,000 steps on the second of two replicas, which goes halfway and takes no step with it."""

    def one_goes(sight: Sight) -> int:
        return 2 if sight.now_s < 5 else 1

    traffic = Traffic([0.0, 0.001], [500, 1000], [10, 20], 20.0)
    done = Simulation(traffic, one_goes, start_s=1.0, replicas=2).run()
    alone_s = 500 * STEP_S[1]
    assert done.finished == 2
    assert done.latencies_s[0] < alone_s * 1.5
    assert done.latencies_s[1] == pytest.approx(1000 * STEP_S[1], rel=0.25)


def test_slots_are_never_overfull_and_jobs_wait_in_turn() -> None:
    jobs = 3 * SLOTS
    traffic = Traffic([0.0] * jobs, [100] * jobs, [4] * jobs, 10.0)
    done = Simulation(traffic, lambda sight: 1, start_s=1.0, replicas=1).run()
    round_s = 100 * STEP_S[SLOTS]
    assert np.allclose(done.waits_s, np.repeat([0.0, round_s, 2 * round_s], SLOTS))
