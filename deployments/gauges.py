"""The gauges that a process says with every heartbeat, and the counters that its engine keeps."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.jobs.records import ClusterView, ReplicaOrders
from cluster.telemetry import metrics
from cluster.telemetry.recorder import Recorder
from deployments.engine.api import Engine, EngineStats

_COUNTED = {
    "denoising_steps": metrics.STEPS,
    "canvas_steps": metrics.CANVAS_STEPS,
    "prefill_tokens": metrics.PREFILL_TOKENS,
    "prefix_lookup_tokens": metrics.PREFIX_LOOKUP_TOKENS,
    "prefix_hit_tokens": metrics.PREFIX_HIT_TOKENS,
}


def tell_cluster(recorder: Recorder, view: ClusterView, waiting: Mapping[int, int]) -> None:
    """What Redis holds, as this router just read it; every router says the same."""
    live = [row for row in view.replicas if row.lease_ms > 0]
    draining = sum(row.draining for row in live)
    recorder.set(metrics.REPLICAS, len(live) - draining, state="ready")
    recorder.set(metrics.REPLICAS, draining, state="draining")
    recorder.set(metrics.ROUTERS, len(view.routers))
    for level, jobs in waiting.items():
        recorder.set(metrics.QUEUE_JOBS, jobs, priority=metrics.LEVELS[level])


class EngineGauges:
    """Of one replica: what its engine does now, and what it did since the last beat."""

    def __init__(self, recorder: Recorder, engine: Engine, *, name: str) -> None:
        self._recorder = recorder
        self._engine = engine
        self._name = name
        self._before = EngineStats()

    def beat(self, orders: ReplicaOrders) -> None:
        """Say it; `orders` are what Redis answered this heartbeat."""
        stats, record, name = self._engine.stats(), self._recorder, self._name
        record.set(metrics.SLOTS, self._engine.slots, replica=name)
        record.set(metrics.FREE_SLOTS, self._engine.slots - stats.active_jobs, replica=name)
        record.set(metrics.ACTIVE_CANVASES, stats.active_jobs, replica=name)
        record.set(metrics.PREEMPTING_JOBS, sum(job.preempt for job in orders.assigned), replica=name)
        record.set(metrics.KV_PAGES, stats.pages_used, replica=name, state="used")
        record.set(metrics.KV_PAGES, stats.pages_total - stats.pages_used, replica=name, state="free")
        for field, metric in _COUNTED.items():
            record.add(metric, getattr(stats, field) - getattr(self._before, field))
        self._before = stats
