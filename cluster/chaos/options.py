"""What a chaos run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.embedded import DEFAULT_CHECKPOINT
from cluster.redis_server import free_port

# A job that is lost 3 times in a row without a new canvas fails, for it may be what kills its replicas. Where replicas
# are killed by chance every few seconds, that happens to innocent jobs too, and it is not what is tested here.
MAX_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """`jobs` are drawn from `seed`; something is killed every `kill_every_s`, as soon as that leaves one alive.

    `in_flight` is the most jobs at once; every second group of jobs comes at half of that, so that both a free slot
    and a queue are met. `replicas`, `routers`, `tp` and `slots` shape the cluster that is started.
    """

    jobs: int = 200
    seed: int = 1
    kill_every_s: float = 2.0
    replicas: int = 2
    routers: int = 2
    tp: int = 1
    slots: int = 12
    in_flight: int = 24

    def settings(self) -> dict[str, Any]:
        """The settings of the cluster to start, as cluster.config.parse_settings takes them."""
        return {
            "checkpoint": str(DEFAULT_CHECKPOINT),
            "state": {"max_attempts": MAX_ATTEMPTS},
            "router": {"replicas": self.routers, "port": free_port()},
            "denoiser": {"replicas": self.replicas, "slots": self.slots, "tp": self.tp},
        }
