"""How Serve is told to scale, and how a router wakes the first replica.

Serve asks each replica for its numbers (`record_autoscaling_stats`, deployments/load.py) and shows them to
deployments/scaling_policy.py in its controller. With no replica there is nobody to ask: then a router that sees jobs
waiting calls the deployment through its handle, and Serve starts a replica for the call.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import RayServeException

from cluster.config import DenoiserSettings, ReplicaRange, RouterSettings
from cluster.jobs.records import ClusterView

logger = logging.getLogger(__name__)

POLICIES = "deployments.scaling_policy"
# How often replicas are asked for their numbers; a decision is at most so much behind.
ASKED_EVERY_S = 2.0
# A call that wakes a replica waits for it: for as long as this, then it is made again while jobs wait.
WAKE_TIMEOUT_S = 600.0


class Waker:
    """Has Serve start a replica while jobs wait and none is there; one call at a time."""

    def __init__(self, call: Callable[[], Awaitable[None]]) -> None:
        """`call` reaches any replica, and has Serve start one when there is none."""
        self._call = call
        self._calling: asyncio.Task[None] | None = None

    def look(self, view: ClusterView) -> None:
        """Compare the queue with the replicas, once a heartbeat."""
        live = any(row.lease_ms > 0 for row in view.replicas)
        if view.queued and not live and (self._calling is None or self._calling.done()):
            self._calling = asyncio.create_task(self._wake(view.queued), name="wake a replica")

    async def close(self) -> None:
        """Give the call up."""
        if self._calling is not None:
            self._calling.cancel()
            await asyncio.gather(self._calling, return_exceptions=True)

    async def _wake(self, queued: int) -> None:
        logger.info("%d jobs wait and there is no replica: one is asked for", queued)
        try:
            async with asyncio.timeout(WAKE_TIMEOUT_S):
                await self._call()
        except (RayServeException, TimeoutError) as error:
            logger.warning("no replica came up, and one is asked for again: %s", error)


def open_connections(port: int) -> int:
    """TCP connections that this process has accepted on `port` and that are open; blocks for a look at the kernel."""
    connections = psutil.Process().net_connections(kind="tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in connections)


def denoiser_count(denoiser: DenoiserSettings) -> dict[str, Any]:
    """The options of the Serve deployment that say how many replicas there are."""
    chosen = denoiser.autoscaling
    if chosen is None:
        return {"num_replicas": denoiser.replicas}
    return _scaled(chosen, "DenoiserPolicy")


def router_count(router: RouterSettings) -> dict[str, Any]:
    """As `denoiser_count`, for routers."""
    chosen = router.autoscaling
    if chosen is None:
        return {"num_replicas": router.replicas}
    return _scaled(chosen, "RouterPolicy")


def _scaled(chosen: ReplicaRange, policy: str) -> dict[str, Any]:
    """Serve's own delays are 0: the policy has waited already where it should."""
    rules = chosen.model_dump(mode="json")
    with warnings.catch_warnings():
        # Serve would have the interval in an environment variable; this is the only way that is of this application.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s`", category=DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=chosen.min_replicas,
            max_replicas=chosen.max_replicas,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            metrics_interval_s=ASKED_EVERY_S,
            policy=AutoscalingPolicy(policy_function=f"{POLICIES}:{policy}", policy_kwargs=rules),
        )
    return {"autoscaling_config": config}
