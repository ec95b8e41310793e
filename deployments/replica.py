"""A Denoiser replica's process: engine, internal gRPC server and lease. Put together here, closed here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc

from cluster.config import Settings
from cluster.errors import EaselError, StartupError, Unavailable
from cluster.jobs.connection import connect_to
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.measured import MeasuredJobStore
from cluster.jobs.records import AssignedJob
from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.rpc.interceptors import EdgeInterceptor
from cluster.rpc.options import server_options
from cluster.telemetry import metrics
from cluster.telemetry.telemetry import Telemetry
from deployments.denoiser import Denoiser
from deployments.door import bind_internal
from deployments.engine.api import Engine
from deployments.gauges import EngineGauges
from deployments.heartbeat import Heartbeat
from deployments.load import ReplicaLoad
from deployments.membership import Membership

logger = logging.getLogger(__name__)

INTERNAL_MAX_BYTES = 64 * 2**20
# The runs have ended by then; their last messages go out.
STREAMS_GRACE_S = 1.0


class Replica:
    """One Denoiser replica: `start` brings it up and registers it, `close` drains it first, then ends it.

    An order from Redis drains it too; it then waits, outside the slot table, until it is replaced. `load` tells what
    autoscaling is to know.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        decode: Callable[[Sequence[int]], str],
        *,
        name: str,
        advertised_host: str,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`telemetry` stays its maker's to close."""
        state = settings.state
        self._telemetry = telemetry or Telemetry()
        redis = connect_to(state)
        self._settings = settings
        self._name = name
        self._advertised_host = advertised_host
        self._store = MeasuredJobStore.recording(self._telemetry.recorder, redis, state)
        self._doorbell = Doorbell(redis, namespace=state.namespace)
        self._membership = Membership(self._store, engine, name=name)
        self._denoiser = Denoiser(
            engine, self._store, decode, membership=self._membership, settings=settings, telemetry=self._telemetry
        )
        self._gauges = EngineGauges(self._telemetry.recorder, engine, name=name)
        self.load = ReplicaLoad(engine, self._store, self._denoiser.tally)
        self._heartbeat = Heartbeat(self._beat, every_s=state.heartbeat_ms / 1000, name=f"{name}: lease")
        self._server = grpc.aio.server(
            interceptors=(EdgeInterceptor(max_request_bytes=INTERNAL_MAX_BYTES),),
            options=server_options(INTERNAL_MAX_BYTES),
        )
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Serve and register; returns the advertised address.

        Raises StartupError, Unavailable, or ConfigError for a Redis whose keys are of another version.
        """
        await self._store.ping()
        pb_grpc.add_DenoiserServicer_to_server(self._denoiser, self._server)
        host = self._settings.denoiser.host
        try:
            port = bind_internal(self._server, f"{host}:0", self._settings)
        except RuntimeError as error:
            raise StartupError(f"denoiser.host: no port can be bound on {host}") from error
        await self._server.start()
        address = f"{self._advertised_host}:{port}"
        self._membership.serve_at(address)
        self._doorbell.on_ring(self._rang)
        await self._doorbell.start(self._name)
        await self._heartbeat.start()
        logger.info("replica %s serves on %s", self._name, address)
        return address

    def check(self) -> None:
        """Raise what makes this replica one to replace: its engine broke, hangs or lost a rank, or it was drained."""
        self._denoiser.check()
        if self._draining is not None and self._draining.done():
            raise Unavailable(f"replica {self._name} is drained, and leaves its place to another")

    async def drain(self) -> None:
        """Take no more jobs, give every job back with its checkpoint, and leave the slot table.

        Takes at most about twice denoiser.drain_timeout_s; what is not given back by then goes without a checkpoint.
        """
        if self._draining is None:
            try:
                await self._membership.announce_drain()
            except EaselError as error:
                logger.warning("replica %s: jobs may still be placed here: %s", self._name, error)
        await asyncio.shield(self._drain("the replica is shutting down"))

    async def close(self) -> None:
        """Give every job back with its checkpoint, leave the slot table, and end. A second call joins the first."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"{self._name}: close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self.drain()
        await self._heartbeat.close()
        await self._server.stop(STREAMS_GRACE_S)
        try:
            await self._denoiser.close(self._settings.denoiser.drain_timeout_s)
        except EaselError as error:
            logger.warning("replica %s: %s", self._name, error)
        await self._doorbell.close()
        await self._store.close()

    def _drain(self, message: str) -> asyncio.Task[None]:
        """Drain once, whoever asks first."""
        if self._draining is None:
            logger.info("replica %s drains: %s", self._name, message)
            self._telemetry.recorder.add(metrics.DRAINS)
            work = self._denoiser.drain(message, self._settings.denoiser.drain_timeout_s)
            self._draining = asyncio.create_task(work, name=f"{self._name}: drain")
        return self._draining

    def _rang(self, kind: str, job_id: str) -> None:
        word, _, epoch = kind.partition(":")
        if word in {"cancelled", "failed"}:
            self._denoiser.ended(job_id, word)
        elif word == "preempt":
            self._denoiser.preempt(AssignedJob(job_id, int(epoch)))
        elif word == "released":
            self._denoiser.reaped(AssignedJob(job_id, int(epoch)))
        elif word == "drain":
            self._drain("the replica was told to drain")

    async def _beat(self) -> None:
        """Renew the lease, stop what Redis no longer assigns here, and do what it orders."""
        known = self._denoiser.running()
        orders = await self._membership.beat()
        if orders is None:
            return
        self._gauges.beat(orders)
        self._denoiser.reconcile(orders.assigned, known)
        self._denoiser.disown(orders.assigned)
        if orders.draining:
            self._drain("the replica was told to drain")
