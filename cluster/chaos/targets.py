"""What a strike may hit now: never the last live one of its kind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psutil

from cluster import embedded
from cluster.chaos.processes import Member, Role, Shape, members
from cluster.chaos.schedule import KillKind
from cluster.client import ClusterView, EaselClient
from cluster.core import ReplicaRow
from cluster.embedded import LocalCluster, redis_process
from cluster.errors import EaselError, StartupError

_ANSWER_S = 3.0
_REPLICA_KINDS = (KillKind.REPLICA, KillKind.FREEZE, KillKind.DRAIN)


@dataclass(frozen=True, slots=True)
class Target:
    """A process that may be hit. `replica` is its name in the slot table, "" for what is no replica.

    `jobs` are those that run on the replica, or in the whole cluster. `had_room` tells that the other replicas had a
    free slot for each job of this one.
    """

    name: str
    process: psutil.Process
    jobs: int
    replica: str = ""
    had_room: bool = False


class Targets:
    """Looks at the processes and at the slot table of the local cluster; `shape` is what it has when it is whole."""

    def __init__(self, client: EaselClient, shape: Shape) -> None:
        self._client = client
        self._shape = shape

    def ever(self, kind: KillKind) -> bool:
        """False when strikes of this kind have nothing to hit in this cluster, or only one."""
        if kind in _REPLICA_KINDS:
            return self._shape.replicas > 1
        if kind is KillKind.REDIS:
            return running().redis_pid is not None
        if kind is KillKind.ROUTER:
            return self._shape.routers > 1
        return self._shape.ranks > 0 and self._shape.replicas > 1

    async def now(self, kind: KillKind) -> list[Target]:
        """All that may be hit at this moment; empty while that would end the last of its kind, or the state is down."""
        cluster = running()
        found = await asyncio.to_thread(members, cluster)
        view = await self._view()
        if view is None:
            return []
        if kind is KillKind.REDIS:
            redis = redis_process(cluster)
            return [] if redis is None else [_any_of("redis", redis, view)]
        if kind is KillKind.ROUTER:
            return _routers(found, int(cluster.address.rpartition(":")[2]), view)
        replicas = live_replicas(found, view)
        if len(replicas) < 2:
            return []
        return _ranks(found, view) if kind is KillKind.RANK else busy(replicas)

    async def _view(self) -> ClusterView | None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._client.status()
        except (TimeoutError, EaselError):
            return None


def running() -> LocalCluster:
    """The local cluster. Raises StartupError when it has ended."""
    cluster = embedded.current()
    if cluster is None:
        raise StartupError("the cluster ended by itself; see its logs")
    return cluster


def live_rows(found: list[Member], view: ClusterView) -> list[tuple[ReplicaRow, Member]]:
    """The replicas that take jobs and whose process runs. A killed one keeps its row until its lease ends."""
    return [
        (row, member)
        for row in view.replicas
        for member in found
        if member.role is Role.DENOISER and not member.frozen and _port(row) in member.ports
        if row.lease_ms > 0 and not row.draining
    ]


def live_replicas(found: list[Member], view: ClusterView) -> list[Target]:
    """The live replicas as targets."""
    live = live_rows(found, view)
    slots = sum(row.slots for row, _ in live)
    return [
        Target(
            name=f"{row.replica} (pid {member.process.pid}, {row.active} jobs)",
            process=member.process,
            replica=row.replica,
            jobs=row.active,
            had_room=view.active + view.queued <= slots - row.slots,
        )
        for row, member in live
    ]


def busy(replicas: list[Target]) -> list[Target]:
    """Those that run jobs, where there are any: a strike should hurt."""
    return [target for target in replicas if target.jobs] or replicas


def _routers(found: list[Member], port: int, view: ClusterView) -> list[Target]:
    serving = [m for m in found if m.role is Role.ROUTER and not m.frozen and port in m.ports]
    return [_any_of("router", m.process, view) for m in serving] if len(serving) > 1 else []


def _ranks(found: list[Member], view: ClusterView) -> list[Target]:
    return [_any_of("rank", m.process, view) for m in found if m.role is Role.RANK]


def _any_of(what: str, process: psutil.Process, view: ClusterView) -> Target:
    return Target(f"{what} (pid {process.pid}, {view.active} jobs run)", process, view.active)


def _port(row: ReplicaRow) -> int:
    return int(row.address.rpartition(":")[2])
