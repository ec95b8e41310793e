"""Numbers to Ray: its agent on each node gathers what its processes record, and serves it to Prometheus."""

from __future__ import annotations

from typing import TypeAlias

from ray.util import metrics as ray_metrics

from cluster.telemetry.metrics import METRICS, Kind, Metric

Made: TypeAlias = "ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram"


class RayRecorder:
    """The metrics of one process that Ray runs. A record goes into a buffer of Ray's, which sends it every 10 s."""

    def __init__(self) -> None:
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._histograms: dict[str, ray_metrics.Histogram] = {}
        for metric in METRICS:
            self._make(metric)

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """See Recorder."""
        if value > 0:  # Ray refuses 0
            self._counters[metric.name].inc(value, tags=labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """See Recorder."""
        self._gauges[metric.name].set(value, tags=labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """See Recorder."""
        self._histograms[metric.name].observe(value, tags=labels)

    def _make(self, metric: Metric) -> None:
        if metric.kind is Kind.COUNTER:
            self._counters[metric.name] = ray_metrics.Counter(metric.name, metric.help, tag_keys=metric.labels)
        elif metric.kind is Kind.GAUGE:
            self._gauges[metric.name] = ray_metrics.Gauge(metric.name, metric.help, tag_keys=metric.labels)
        else:
            self._histograms[metric.name] = ray_metrics.Histogram(
                metric.name, metric.help, boundaries=list(metric.bounds), tag_keys=metric.labels
            )
