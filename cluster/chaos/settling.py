"""What is left when all jobs have ended, and when the cluster has been stopped: nothing may be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

import psutil

from cluster.chaos.processes import Shape, members, shape_of
from cluster.chaos.targets import live_rows, running
from cluster.client import EaselClient
from cluster.embedded import LocalCluster, redis_process, session_of
from cluster.errors import EaselError

SETTLE_S = 60.0
GONE_S = 15.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Leak:
    """What there is too much of, and what is not back: slots taken or jobs queued without a job, and processes."""

    slots: int
    processes: int
    missing: int

    @property
    def nothing(self) -> bool:
        """True when the cluster is as it was before."""
        return self == Leak(0, 0, 0)


async def settled(client: EaselClient, shape: Shape, timeout_s: float = SETTLE_S) -> Leak:
    """Wait until the idle cluster has `shape` and no slot is taken; returns what was wrong at the last look."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        leak = await _look(client, shape)
        if leak.nothing or time.monotonic() > give_up_s:
            return leak
        await asyncio.sleep(_LOOK_S)


def watched(cluster: LocalCluster) -> list[psutil.Process]:
    """The processes of a cluster that is about to be stopped."""
    redis = redis_process(cluster)
    return session_of(cluster.pid) + ([] if redis is None else [redis])


def left_over(cluster: LocalCluster, before: list[psutil.Process], timeout_s: float = GONE_S) -> int:
    """How many processes of a stopped cluster still run, those that joined its session since `before` included."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        left = {process for process in before if _runs(process)} | set(session_of(cluster.pid))
        if not left or time.monotonic() > give_up_s:
            return len(left)
        time.sleep(_LOOK_S)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def _look(client: EaselClient, shape: Shape) -> Leak:
    found = await asyncio.to_thread(members, running())
    now = shape_of(found)
    pairs = ((now.replicas, shape.replicas), (now.routers, shape.routers), (now.ranks, shape.ranks))
    extra = sum(max(have - want, 0) for have, want in pairs)
    with contextlib.suppress(EaselError):
        view = await client.status()
        missing = max(shape.replicas - len(live_rows(found, view)), 0) + max(shape.routers - now.routers, 0)
        return Leak(view.active + view.queued, extra, missing)
    return Leak(0, extra, shape.replicas + shape.routers)
