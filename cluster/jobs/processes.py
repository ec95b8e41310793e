"""The processes behind the jobs: leases of replicas and routers, and what becomes of jobs when one goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from cluster.jobs.caller import Caller
from cluster.jobs.connection import redis_errors
from cluster.jobs.keys import checked_id
from cluster.jobs.records import ClusterView, ReplicaHello, ReplicaOrders, parse_orders, parse_replica, short
from cluster.jobs.scripts import Call, Reply
from cluster.jobs.states import AttemptEnd
from cluster.policy.ordering import OLDEST, members_of_level

_PLACED_PER_LOOK = 256
_REAPED_PER_LOOK = 256
_ADOPTED_PER_LOOK = 32


class Processes(Caller):
    """Leases, drains and adoption. Raises Unavailable when Redis cannot be used."""

    async def assign(self) -> int:
        """Place as many waiting jobs as slots allow; returns how many. Drops those past their deadline."""
        reply = cast("list[int]", await self._run(self._assign("")))
        return reply[0]

    async def look(self, router: str) -> tuple[str, ...]:
        """What a router does again and again, in one round trip.

        Takes back the jobs of replicas whose lease has ended, places what can be placed, and adopts jobs of
        routers that are gone. Returns the jobs adopted: `router` has charge of them from now on.
        """
        sweep = self._call("sweep", args=(_REAPED_PER_LOOK,))
        adopt = self._call("adopt", args=(checked_id("router", router), _ADOPTED_PER_LOOK))
        _, _, adopted = await self._run_all((sweep, self._assign(""), adopt))
        return tuple(job_id.decode() for job_id in cast("list[bytes]", adopted))

    async def heartbeat_replica(self, hello: ReplicaHello) -> ReplicaOrders:
        """Renew a replica's lease and row. Returns what Redis says it runs: it must stop anything else."""
        said = (hello.replica, hello.address, hello.model, hello.version, hello.slots, json.dumps(hello.stats))
        call = self._call("heartbeat_replica", self._rows(hello.replica), said)
        draining, running = cast("list[Reply]", await self._run(call))
        return parse_orders(cast(int, draining), cast("list[bytes]", running))

    async def heartbeat_router(self, router: str) -> frozenset[str]:
        """Renew a router's lease. Returns the jobs it has charge of, as far as Redis knows."""
        owned = await self._run(self._call("heartbeat_router", args=(checked_id("router", router),)))
        return frozenset(job_id.decode() for job_id in cast("list[bytes]", owned))

    async def drain_replica(self, replica: str) -> int:
        """Give a replica no more jobs, and have it give back those it runs; returns how many.

        Raises ReplicaNotFound.
        """
        call = self._call("drain", self._rows(replica), (replica,))
        return cast(int, await self._run(call, tried=replica))

    async def leave_replica(self, replica: str, end: AttemptEnd, message: str) -> int:
        """Take a replica out of the slot table at once; what it still runs goes back to the queue.

        Returns how many jobs that were.
        """
        said = (replica, end.value, short(message), int(end.is_loss))
        return cast(int, await self._run(self._call("leave_replica", self._rows(replica), said)))

    async def leave_router(self, router: str) -> None:
        """Give a router's lease back; the others adopt what it had charge of."""
        await self._run(self._call("leave_router", args=(checked_id("router", router),)))

    async def queued(self) -> int:
        """How many jobs wait: one cheap call, for what every replica asks again and again."""
        with redis_errors(self._limits.retry_after_ms):
            return await self._redis.zcard(self._keys.queue)

    async def set_quotas(self, rows: Mapping[str, str]) -> None:
        """Replace the limits of all tenants by these (cluster.jobs.quotas); jobs that they let in are placed.

        Jobs that this store submits count from now on, unless there are no limits.
        """
        self._has_quotas = bool(rows)
        flat = tuple(word for row in rows.items() for word in row)
        await self._run(self._call("quotas", args=flat))

    async def view(self) -> ClusterView:
        """Replicas, routers and the queue at one moment."""
        queued, routers, rows = cast("list[Reply]", await self._run(Call("view", self._fixed, ())))
        return ClusterView(
            replicas=tuple(parse_replica(row) for row in cast("list[list[bytes]]", rows)),
            routers=tuple(router.decode() for router in cast("list[bytes]", routers)),
            queued=cast(int, queued),
        )

    async def waiting(self) -> dict[int, int]:
        """How many jobs wait at each level of the queue (cluster/policy/ordering.py), all levels named.

        Those that a quota holds are in none: no slot would help them.
        """
        levels = range(1, OLDEST + 1)
        with redis_errors(self._limits.retry_after_ms):
            pipeline = self._redis.pipeline(transaction=False)
            for level in levels:
                pipeline.zlexcount(self._keys.queue, *members_of_level(level))
            counts = cast("list[int]", await pipeline.execute())
        return dict(zip(levels, counts, strict=True))

    def _assign(self, job_id: str) -> Call:
        return self._call("assign", args=(_PLACED_PER_LOOK, job_id))

    def _rows(self, replica: str) -> tuple[str, str]:
        return self._keys.replica(replica), self._keys.running(replica)
