"""A Denoiser replica's process: engine, internal gRPC server and lease. Put together here, closed here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict

import grpc

from cluster.config import Settings
from cluster.errors import EaselError, StartupError
from cluster.jobs.connection import connect
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.records import ReplicaHello
from cluster.jobs.store import JobStore
from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.rpc.interceptors import EdgeInterceptor
from cluster.rpc.options import server_options
from deployments.denoiser import Denoiser
from deployments.engine.api import Engine
from deployments.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

INTERNAL_MAX_BYTES = 64 * 2**20


class Replica:
    """One Denoiser replica: `start` brings it up and registers it, `close` takes it out first, then ends it."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        decode: Callable[[Sequence[int]], str],
        *,
        name: str,
        advertised_host: str,
    ) -> None:
        state = settings.state
        redis = connect(state.url, timeout_s=state.timeout_s)
        self._settings = settings
        self._name = name
        self._advertised_host = advertised_host
        self._engine = engine
        self._store = JobStore(redis, namespace=state.namespace, lease_ms=state.lease_ms, retention_s=state.retention_s)
        self._doorbell = Doorbell(redis, namespace=state.namespace)
        self._denoiser = Denoiser(engine, self._store, decode, name=name)
        self._heartbeat = Heartbeat(self._beat, every_s=state.heartbeat_ms / 1000, name=f"{name}: lease")
        self._server = grpc.aio.server(
            interceptors=(EdgeInterceptor(max_request_bytes=INTERNAL_MAX_BYTES),),
            options=server_options(INTERNAL_MAX_BYTES),
        )
        self._address = ""

    async def start(self) -> str:
        """Serve and register; returns the advertised address. Raises StartupError or Unavailable."""
        pb_grpc.add_DenoiserServicer_to_server(self._denoiser, self._server)
        host = self._settings.denoiser.host
        try:
            port = self._server.add_insecure_port(f"{host}:0")
        except RuntimeError as error:
            raise StartupError(f"denoiser.host: no port can be bound on {host}") from error
        await self._server.start()
        self._address = f"{self._advertised_host}:{port}"
        self._doorbell.on_ring(self._rang)
        await self._doorbell.start(self._name)
        await self._heartbeat.start()
        logger.info("replica %s serves on %s", self._name, self._address)
        return self._address

    def check(self) -> None:
        """Raise the EngineError of a broken engine; Serve then replaces this replica."""
        if self._denoiser.failure is not None:
            raise self._denoiser.failure

    async def close(self) -> None:
        """Leave the slot table so that no job comes, end the running ones, and give everything back."""
        drain_s = self._settings.denoiser.drain_timeout_s
        await self._heartbeat.close()
        try:
            await self._store.remove_replica(self._name)
        except EaselError as error:
            logger.warning("replica %s: its lease is left to run out: %s", self._name, error)
        stopping = asyncio.create_task(self._server.stop(drain_s))
        try:
            await self._denoiser.close(drain_s)
        except EaselError as error:
            logger.warning("replica %s: %s", self._name, error)
        await stopping
        await self._doorbell.close()
        await self._store.close()

    def _rang(self, kind: str, job_id: str) -> None:
        if kind in {"cancelled", "failed"}:
            self._denoiser.ended(job_id, kind)

    async def _beat(self) -> None:
        """Renew the lease while the engine works, and stop what Redis no longer assigns here."""
        if self._denoiser.failure is not None:
            await self._store.remove_replica(self._name)
            return
        known = self._denoiser.running()
        card, stats = self._engine.card, self._engine.stats()
        assigned = await self._store.heartbeat_replica(
            ReplicaHello(
                replica=self._name,
                address=self._address,
                model=card.name,
                version=card.version,
                slots=self._engine.slots,
                stats={name: float(value) for name, value in asdict(stats).items()},
            )
        )
        self._denoiser.reconcile(assigned, known)
        self._denoiser.disown(assigned)
