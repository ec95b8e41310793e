"""What Serve's controller runs, and what replicas tell it; with Serve's own context, but no cluster."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any, cast

import pytest

from cluster.config import DenoiserSettings, RouterSettings, parse_settings
from cluster.core import ReplicaRow
from cluster.errors import Unavailable
from cluster.jobs.records import ClusterView
from cluster.jobs.store import JobStore
from deployments.engine.api import Engine, EngineStats
from deployments.load import ReplicaLoad, Tally
from deployments.pace import Pace
from deployments.scaling_policy import STALE_AFTER_S, DenoiserPolicy, RouterPolicy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray.serve uses pydantic in a way that pydantic warns of
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.config import AutoscalingContext

    from deployments.scaling import Waker, denoiser_count, router_count

AUTOSCALING = {"min_replicas": 1, "max_replicas": 4, "target_wait_s": 5.0}
DENOISER = DenoiserSettings.model_validate({"autoscaling": AUTOSCALING})
NOW_S = 1000.0
NUMBERS = {
    "queued_jobs": 0.0,
    "active_jobs": 8.0,
    "active_canvases": 8.0,
    "canvases_per_s": 0.0,
    "canvases_per_job": 4.0,
    "slots": 8.0,
    "start_s": 3.0,
}


def context(*said: dict[str, float], target: int, at_s: float = NOW_S, state: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - Serve's
    """Serve's context where each replica said something at `at_s`."""
    deployment = DeploymentID("Denoiser", "easel")
    metrics: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for number, numbers in enumerate(said):
        for name, value in numbers.items():
            series = [TimeStampedValue(at_s - 1, -1.0), TimeStampedValue(at_s, value)]
            metrics.setdefault(name, {})[ReplicaID(str(number), deployment)] = series
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="Denoiser",
        app_name="easel",
        current_num_replicas=len(said),
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=lambda: metrics,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW_S,
        config=None,
    )


def denoiser_policy() -> DenoiserPolicy:
    """As Serve makes it: from what `denoiser_count` says, through the form in which it travels to the controller."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # see deployments/scaling.py
        sent = DeploymentConfig(**denoiser_count(DENOISER)).to_proto_bytes()
        config = DeploymentConfig.from_proto_bytes(sent).autoscaling_config
    assert config is not None
    return cast(DenoiserPolicy, config.policy.get_policy()(**config.policy.policy_kwargs))


def test_serves_delays_are_off_because_the_policy_waits_itself() -> None:
    config = denoiser_count(DENOISER)["autoscaling_config"]
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
    assert (config.min_replicas, config.max_replicas) == (1, 4)


def test_without_autoscaling_the_number_is_fixed() -> None:
    assert denoiser_count(DenoiserSettings(replicas=7)) == {"num_replicas": 7}
    assert router_count(RouterSettings(replicas=3)) == {"num_replicas": 3}


def test_the_queue_brings_replicas() -> None:
    wanted, _ = denoiser_policy()(context(NUMBERS | {"queued_jobs": 16.0}, target=1))
    assert wanted == 3


def test_the_freshest_word_on_the_queue_counts() -> None:
    old = context(NUMBERS | {"queued_jobs": 100.0}, target=2, at_s=NOW_S - 5).raw_metrics
    fresh = context(NUMBERS, NUMBERS, target=2)
    for name, series in old.items():
        fresh.raw_metrics[name] |= series
    assert denoiser_policy()(fresh)[0] == 2


@pytest.mark.parametrize("at_s", [NOW_S - STALE_AFTER_S - 1, NOW_S])
def test_where_nobody_tells_anything_the_number_stays(at_s: float) -> None:
    said = [NUMBERS | {"queued_jobs": 100.0}] if at_s < NOW_S else []
    state = {"kept": 1}
    assert denoiser_policy()(context(*said, target=2, at_s=at_s, state=state)) == (2, state)


def test_the_state_goes_through_serve_from_call_to_call() -> None:
    policy = denoiser_policy()
    _, state = policy(context(NUMBERS, target=1))
    _, again = policy(context(NUMBERS, target=1, state=state))
    assert state.keys() == again.keys()


def test_routers_scale_on_the_connections_of_all() -> None:
    policy = RouterPolicy(min_replicas=1, max_replicas=9, scale_down_after_s=60.0, connections_per_router=100)
    assert policy(context({"connections": 150.0}, {"connections": 100.0}, target=2))[0] == 3


def test_the_pace_tells_canvases_by_their_steps() -> None:
    pace = Pace()
    assert (pace.active, pace.canvases_per_s) == (0.0, 0.0)
    for second in range(30):
        pace.mark(float(second), EngineStats(canvas_steps=40 * second, canvases=2 * second, active_jobs=4))
    assert pace.active == 4.0
    assert pace.canvases_per_s == pytest.approx(2.0)


def test_a_pace_without_a_finished_canvas_is_not_known() -> None:
    pace = Pace()
    for second in range(3):
        pace.mark(float(second), EngineStats(canvas_steps=10 * second, active_jobs=1))
    assert pace.canvases_per_s == 0.0


def test_the_tally_follows_what_jobs_ask_for() -> None:
    tally = Tally()
    assert tally.canvases_per_job == 0.0
    for canvases in (2, 4):
        tally.ended(canvases)
    assert tally.canvases_per_job == pytest.approx(3.0, rel=0.01)
    for _ in range(2000):
        tally.ended(10)
    assert tally.canvases_per_job == pytest.approx(10.0, rel=0.01)


class Away:
    """A store whose Redis goes away after the first question."""

    def __init__(self) -> None:
        self.asked = 0

    async def queued(self) -> int:
        self.asked += 1
        if self.asked > 1:
            raise Unavailable("gone", retry_after_ms=1)
        return 7


class Still:
    """An engine that has done nothing."""

    slots = 4

    def stats(self) -> EngineStats:
        return EngineStats()


async def test_while_redis_is_away_the_queue_is_what_it_was() -> None:
    load = ReplicaLoad(cast(Engine, Still()), cast(JobStore, Away()), Tally())
    assert [(await load.read())["queued_jobs"] for _ in range(2)] == [7, 7]
    assert set(await load.read()) == set(NUMBERS)


def view(*, queued: int, lease_ms: int | None) -> ClusterView:
    rows = () if lease_ms is None else (ReplicaRow("r", "a", "m", "v", slots=1, active=0, lease_ms=lease_ms, stats={}),)
    return ClusterView(rows, ("router",), queued)


@pytest.mark.parametrize(("queued", "lease_ms", "calls"), [(0, None, 0), (3, 1000, 0), (3, None, 1), (3, 0, 1)])
async def test_jobs_without_a_replica_wake_one(queued: int, lease_ms: int | None, calls: int) -> None:
    made = []

    async def call() -> None:
        made.append(1)
        await asyncio.Event().wait()

    waker = Waker(call)
    for _ in range(3):
        waker.look(view(queued=queued, lease_ms=lease_ms))
        await asyncio.sleep(0)
    await waker.close()
    assert len(made) == calls


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"denoiser": {"autoscaling": {}}}, "denoiser.autoscaling.max_replicas: must be set"),
        (
            {"denoiser": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}},
            "denoiser.autoscaling.max_replicas: 2 is not allowed: min_replicas is 3",
        ),
        ({"router": {"autoscaling": {"min_replicas": 0}}}, "router.autoscaling.min_replicas: 0 is not allowed"),
        (
            {"denoiser": {"autoscaling": {"max_replicas": 2, "target_wait_s": 0}}},
            "denoiser.autoscaling.target_wait_s: 0 is not allowed",
        ),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, Any], named: str) -> None:
    from cluster.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        parse_settings({"checkpoint": "x", **values})
    assert str(caught.value).startswith(named)


def test_settings_of_autoscaling_survive_a_trip_through_plain_data() -> None:
    values = {"denoiser": {"autoscaling": AUTOSCALING}, "router": {"autoscaling": {"max_replicas": 2}}}
    settings = parse_settings({"checkpoint": "x", **values})
    assert parse_settings(settings.model_dump(mode="json")) == settings
    assert (settings.denoiser.least_replicas, settings.denoiser.most_replicas, settings.router.most_replicas) == (
        1,
        4,
        2,
    )
