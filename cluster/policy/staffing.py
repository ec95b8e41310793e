"""How many replicas a steady load needs so that hardly any job waits longer than the target.

A replica serves `slots` canvases at once; a queue in front of all slots is one queue with many servers. For those, with
m servers of which `a` are busy on average (Halfin and Whitt 1981, "Heavy-traffic limits for queues with many
exponential servers"):

    P(a job waits)             = 1 / (1 + b * Phi(b) / phi(b)),  b = (m - a) / sqrt(m)
    P(it waits longer than T)  = P(a job waits) * exp(-spare * T),  spare = jobs/s served beyond those that come

So a large cluster needs less headroom per replica than a small one, and a target of some seconds less than one of none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# What `target_wait_s` promises: all but this share of the jobs wait less.
LATE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Demand:
    """A steady load: canvases/s that come, canvases/s that one full replica makes (above 0), canvases of a job."""

    canvases_per_s: float
    replica_canvases_per_s: float
    canvases_per_job: float


def replicas_for(demand: Demand, *, slots: int, target_wait_s: float, most: int) -> int:
    """The least number of replicas of `slots` at which 95% of jobs wait at most `target_wait_s`; at most `most`."""
    least = math.floor(min(float(most), demand.canvases_per_s / demand.replica_canvases_per_s))
    for replicas in range(max(least, 0), most):
        if late_share(demand, replicas, slots=slots, target_wait_s=target_wait_s) <= LATE_SHARE:
            return replicas
    return most


def late_share(demand: Demand, replicas: int, *, slots: int, target_wait_s: float) -> float:
    """The share of jobs that wait longer than the target with so many replicas; 1 when they cannot keep up."""
    if demand.canvases_per_s <= 0:
        return 0.0
    spare = replicas * demand.replica_canvases_per_s - demand.canvases_per_s
    if spare <= 0:
        return 1.0
    servers = replicas * slots
    busy = demand.canvases_per_s / demand.replica_canvases_per_s * slots
    waits = _waiting_share((servers - busy) / math.sqrt(servers))
    return waits * math.exp(-spare / demand.canvases_per_job * target_wait_s)


def _waiting_share(margin: float) -> float:
    """P(a job waits) with `margin` spare servers in units of their square root; `margin` is above 0."""
    density = math.exp(-margin * margin / 2) / math.sqrt(2 * math.pi)
    if density == 0:
        return 0.0
    below = (1 + math.erf(margin / math.sqrt(2))) / 2
    return 1 / (1 + margin * below / density)
