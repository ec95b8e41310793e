"""Metrics and traces of the product: a local Ray cluster, its agent's endpoint, and a collector outside of it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import yaml
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cluster.chaos.processes import Role, members
from cluster.embedded import LocalCluster
from cluster.redis_server import free_port
from cluster.telemetry.metrics import METRICS, exported
from tests.e2e.collector import Collector, attributes, collecting
from tests.e2e.test_cluster import UP_TIMEOUT_S, Command

# Ray sends every 10 s, and a slow machine takes its time.
SENT_WITHIN_S = 60.0
SERIES = {series: metric for metric in METRICS for series in exported(metric)}


@dataclass(frozen=True)
class Told:
    """A cluster that has answered four jobs, and lost a replica under one of them."""

    easel: Command
    collector: Collector


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + SENT_WITHIN_S
    while not condition():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.5)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    easel = Command(tmp_path_factory.mktemp("home"))
    with collecting() as collector:
        engine = {"engine": "fake", "slots": 1, "replicas": 2, "fake_step_ms": 15.0, "fake_steps_per_canvas": 100}
        traces = {"enabled": True, "endpoint": collector.address}
        config = easel.home / "settings.yaml"
        config.write_text(yaml.safe_dump({"denoiser": engine, "telemetry": {"traces": traces}}))
        up = easel("up", "--port", str(free_port()), "--config", str(config), timeout_s=UP_TIMEOUT_S)
        assert up.returncode == 0, up.stderr + up.stdout
        try:
            lose_a_replica(easel)
            yield Told(easel, collector)
        finally:
            down = easel("down", timeout_s=120)
        assert down.returncode == 0, down.stderr


def lose_a_replica(easel: Command) -> None:
    line = easel.line("generate", "count 31 to 34", "--json", "--max-new-tokens", "128")
    calls = [subprocess.Popen(line, env=easel.environment(), stdout=subprocess.DEVNULL) for _ in range(4)]
    wait_for(lambda: easel.json("status")["active"] == 2, "two jobs run")
    cluster = LocalCluster(**easel.record())
    next(member.process for member in members(cluster) if member.role is Role.DENOISER).kill()
    assert [call.wait(120) for call in calls] == [0, 0, 0, 0]


def lines_of(easel: Command, *words: str) -> list[str]:
    done = easel("metrics", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ray_exports_the_metrics_under_the_names_and_labels_of_the_table(told: Told) -> None:
    wait_for(lambda: any("retries_total" in line for line in lines_of(told.easel)), "a retry is told")
    of_ray = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "NodeId", "le"}
    seen = set()
    for line in lines_of(told.easel, "--raw"):
        if line.startswith("#"):
            continue
        name, labels = line.split("{")[0], set(re.findall(r'(\w+)="', line))
        assert name in SERIES
        seen.add(SERIES[name])
        own = {label for label in labels - of_ray if not label.startswith("otel_scope")}
        assert own == set(SERIES[name].labels), line
    # The others need a preemption, a drain, a Redis that is away, or prompts that share a beginning.
    rare = ("preemptions", "drain", "redis_errors", "prefix")
    assert {metric for metric in METRICS if not any(word in metric.name for word in rare)} <= seen


def test_a_lost_replica_is_in_the_metrics_of_the_one_that_goes_on(told: Told) -> None:
    wait_for(lambda: any("failover_seconds_count" in line for line in lines_of(told.easel)), "a failover is told")
    lines = lines_of(told.easel)
    (retries,) = [line for line in lines if line.startswith('ray_easel_retries_total{reason="REPLICA_LOST"')]
    assert retries.endswith(" 1.0")
    wait_for(lambda: any(_says(line, "jobs_total", "succeeded", 4) for line in lines_of(told.easel)), "4 jobs are told")


def _says(line: str, name: str, label: str, value: float) -> bool:
    return line.startswith(f"ray_easel_{name}") and f'"{label}"' in line and line.endswith(f" {value:.1f}")


def test_a_killed_replica_leaves_two_attempts_under_one_job_at_the_collector(told: Told) -> None:
    wait_for(lambda: len(told.collector.named("job")) == 4, "4 jobs are at the collector")
    attempts: dict[bytes, list[Span]] = {job.span_id: [] for job in told.collector.named("job")}
    for attempt in told.collector.named("attempt"):
        attempts[attempt.parent_span_id].append(attempt)
    assert sorted(len(of_job) for of_job in attempts.values()) == [1, 1, 1, 2]
    (twice,) = [of_job for of_job in attempts.values() if len(of_job) == 2]
    assert len({attributes(attempt)["easel.replica"] for attempt in twice}) == 2
    wait_for(
        lambda: any(run.parent_span_id == twice[1].span_id for run in told.collector.named("denoise")),
        "the second run is at the collector",
    )
