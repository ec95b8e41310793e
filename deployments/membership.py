"""A replica's place in the slot table: its row and lease, from the first heartbeat until it leaves."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from cluster.jobs.records import ReplicaHello, ReplicaOrders
from cluster.jobs.states import AttemptEnd
from cluster.jobs.store import JobStore
from deployments.engine.api import Engine
from deployments.writing import persist


class Membership:
    """Registers one replica and takes it out again, once.

    Invariant: no heartbeat reaches Redis after `leave` was called, so a replica that has left never comes back.
    """

    def __init__(self, store: JobStore, engine: Engine, *, name: str) -> None:
        self.name = name
        self._store = store
        self._engine = engine
        self._address = ""
        self._leaving = False
        self._gone = False
        self._one_at_a_time = asyncio.Lock()

    @property
    def leaving(self) -> bool:
        """True from the first `leave` on."""
        return self._leaving

    def serve_at(self, address: str) -> None:
        """Where routers reach the replica; said with every heartbeat."""
        self._address = address

    async def beat(self) -> ReplicaOrders | None:
        """Renew the lease and hear what to do; None once the replica leaves. Raises Unavailable."""
        async with self._one_at_a_time:
            if self._leaving:
                return None
            card, stats = self._engine.card, self._engine.stats()
            return await self._store.heartbeat_replica(
                ReplicaHello(
                    replica=self.name,
                    address=self._address,
                    model=card.name,
                    version=card.version,
                    slots=self._engine.slots,
                    stats={name: float(value) for name, value in asdict(stats).items()},
                )
            )

    async def announce_drain(self) -> None:
        """Take no new jobs from now on. Raises ReplicaNotFound or Unavailable."""
        if not self._leaving:
            await self._store.drain_replica(self.name)

    async def leave(self, end: AttemptEnd, message: str, patience_s: float) -> None:
        """Leave at once; what Redis still assigns here goes back to the queue. Nothing happens once that is done.

        Raises Unavailable when Redis stays away for `patience_s`; the lease then ends by itself.
        """
        self._leaving = True
        async with self._one_at_a_time:
            if not self._gone:
                await persist(lambda: self._store.leave_replica(self.name, end, message), patience_s)
                self._gone = True
