"""The Cluster service: replicas, slots and the queue, for people and dashboards, and the order to drain a replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc

from cluster.config import DenoiserSettings
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.auth import caller
from cluster.rpc.easel.v1 import cluster_pb2 as pb
from cluster.rpc.easel.v1 import cluster_pb2_grpc as pb_grpc


class ClusterService(pb_grpc.ClusterServicer):
    """Serves easel.v1.Cluster from what Redis holds, so that every router answers alike.

    Only `pending`, the lines on replicas without a place, is what this router saw last.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        queue_limit: int,
        version: str,
        pending: Callable[[], Sequence[str]],
        denoisers: DenoiserSettings,
    ) -> None:
        self._store = store
        self._queue_limit = queue_limit
        self._version = version
        self._pending = pending
        self._autoscaling = denoisers.autoscaling

    async def GetStatus(  # noqa: N802 - named by the proto
        self,
        request: pb.GetStatusRequest,
        context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.ClusterStatus],
    ) -> pb.ClusterStatus:
        """See cluster.proto."""
        view = await self._store.view()
        scaled = self._autoscaling
        live = [row for row in view.replicas if row.lease_ms > 0]
        admin = caller().admin
        return pb.ClusterStatus(
            replicas=[convert.replica_to_proto(row) for row in live if admin],
            slots=sum(row.slots for row in live),
            active=sum(row.active for row in live),
            queued=view.queued,
            queue_limit=self._queue_limit,
            routers=view.routers if admin else (),
            version=self._version,
            pending=self._pending() if admin else (),
            min_replicas=0 if scaled is None else scaled.min_replicas,
            max_replicas=0 if scaled is None else scaled.max_replicas,
        )

    async def DrainReplica(  # noqa: N802
        self,
        request: pb.DrainReplicaRequest,
        context: grpc.aio.ServicerContext[pb.DrainReplicaRequest, pb.DrainReplicaResponse],
    ) -> pb.DrainReplicaResponse:
        """See cluster.proto. The order is in Redis before the answer; the replica hears of it from there."""
        caller().require_admin("DrainReplica")
        return pb.DrainReplicaResponse(running_jobs=await self._store.drain_replica(request.replica))
