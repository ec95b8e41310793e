"""Where numbers go. The composition root chooses: Ray's agent (deployments/ray_metrics.py), or nowhere."""

from __future__ import annotations

from typing import Protocol

from cluster.telemetry.metrics import Metric


class Recorder(Protocol):
    """Takes what is measured; must be cheap, callable from any thread, and raise nothing.

    Labels are exactly those of the metric.
    """

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Raise a counter; a value of 0 changes nothing."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Say what a gauge is now."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Put one value into a histogram, in the unit of its name."""


class Unrecorded:
    """A recorder that forgets."""

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Nothing."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Nothing."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Nothing."""
