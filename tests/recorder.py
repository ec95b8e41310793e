"""A recorder for tests: it keeps what it is told, and is strict about names and labels."""

from __future__ import annotations

from collections import defaultdict

from cluster.telemetry.metrics import METRICS, Kind, Metric

Series = tuple[str, ...]


class Recorded:
    """Values by metric and label values. Refuses a metric outside the table, the wrong kind, and other labels."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[Series, float]] = defaultdict(lambda: defaultdict(float))
        self.last: dict[str, dict[Series, float]] = defaultdict(dict)
        self.seen: dict[str, dict[Series, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        self.sums[metric.name][_checked(metric, Kind.COUNTER, labels)] += value

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self.last[metric.name][_checked(metric, Kind.GAUGE, labels)] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        assert value >= 0, (metric.name, value)
        self.seen[metric.name][_checked(metric, Kind.HISTOGRAM, labels)].append(value)

    def total(self, metric: Metric, *labels: str) -> float:
        """A counter: of one series, or of all where no label is given."""
        series = self.sums[metric.name]
        return series[labels] if labels else sum(series.values())

    def values(self, metric: Metric, *labels: str) -> list[float]:
        """What a histogram was given."""
        return self.seen[metric.name][labels]


def _checked(metric: Metric, kind: Kind, labels: dict[str, str]) -> Series:
    assert metric in METRICS
    assert metric.kind is kind, metric
    assert tuple(sorted(labels)) == tuple(sorted(metric.labels)), (metric, labels)
    assert all(labels.values()), (metric, labels)
    return tuple(labels[name] for name in metric.labels)
