"""A router: the public gRPC server and all that stands behind it. Put together here, closed here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from cluster import __version__
from cluster.checkpoint import read_checkpoint
from cluster.config import Settings
from cluster.core import ModelCard
from cluster.engines import ENGINES, EngineTraits
from cluster.errors import EaselError, StartupError
from cluster.jobs.connection import connect_to
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.measured import MeasuredJobStore
from cluster.jobs.quotas import quota_rows
from cluster.jobs.records import ClusterView
from cluster.rpc.calls import CallWatch
from cluster.rpc.easel.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from cluster.telemetry.telemetry import Telemetry
from deployments.charge import Surroundings
from deployments.cluster_service import ClusterService
from deployments.door import Door, internal_tls
from deployments.gauges import tell_cluster
from deployments.generation import GenerationService
from deployments.heartbeat import Heartbeat
from deployments.intake import Intake
from deployments.job_service import JobService
from deployments.replicas import Replicas
from deployments.supervisor import Supervisor
from deployments.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PORT_PATIENCE_S = 5.0
PORT_RETRY_S = 0.1
LEAVING_S = 3.0
# The health service that decides whether a router gets calls (k8s/base/rayservice.yaml). It says nothing of Redis: when
# that is away, all routers would leave their Service at once, and callers would get no answer in place of UNAVAILABLE.
READINESS = "readiness"
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name,
    jobs_pb2.DESCRIPTOR.services_by_name["Jobs"].full_name,
    cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name,
)


class Router:
    """One router process: `start` brings it up, `close` drains it. Its telemetry stays its maker's to close."""

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        pending: Callable[[], Sequence[str]] = tuple,
        engine: EngineTraits | None = None,
        on_view: Callable[[ClusterView], None] | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Read the checkpoint's card and tokenizer; `pending` tells which replicas have no place, a line each.

        `engine` is what the replicas can do; None for what the engine of the settings can. `on_view` is shown the
        cluster at every heartbeat. Raises CheckpointError, or ConfigError for files of section `security` that cannot
        be used.
        """
        self._settings, self._name, self._door = settings, name, Door(settings)
        self._pending, self._on_view, self._telemetry = pending, on_view, telemetry or Telemetry()
        state, router = settings.state, settings.router
        redis = connect_to(state)
        self._store = MeasuredJobStore.recording(self._telemetry.recorder, redis, state)
        self._doorbell = Doorbell(redis, namespace=state.namespace)
        self._replicas = Replicas(internal_tls(settings))
        self._takes_jobs: frozenset[str] = frozenset()
        shared = (self._store, self._replicas, self._doorbell, name, state.outage_patience_s, self._telemetry)
        self._supervisor = Supervisor(Surroundings(*shared))
        self._look = Heartbeat(self._supervisor.look, every_s=router.look_every_ms / 1000, name=f"{name}: look")
        self._intake = self._make_intake(engine or ENGINES[settings.denoiser.engine])
        self._generation = GenerationService(self._intake, self._supervisor)
        self._health = health_aio.HealthServicer()
        self._heartbeat = Heartbeat(self._beat, every_s=state.heartbeat_ms / 1000, name=f"{name}: lease")
        self._server: grpc.aio.Server | None = None
        self._probes: grpc.aio.Server | None = None
        self._closing: asyncio.Task[None] | None = None

    def _make_intake(self, engine: EngineTraits) -> Intake:
        return Intake(
            name=self._name,
            card=_served_card(self._settings),
            tokenizer=Tokenizer(Path(self._settings.checkpoint)),
            engine=engine,
            store=self._store,
            doorbell=self._doorbell,
            supervisor=self._supervisor,
        )

    async def start(self) -> int:
        """Register in Redis and serve; returns the port. Raises StartupError, ConfigError or Unavailable."""
        await self._store.ping()
        await self._store.set_quotas(quota_rows(self._settings.security.quotas))
        self._doorbell.on_ring(self._supervisor.ring)
        await self._doorbell.start(self._name)
        await self._heartbeat.start()
        await self._look.start()
        self._server, port = await self._listen()
        self._probes = await self._door.open_for_probes(self._health)
        logger.info("router %s serves on %s:%d", self._name, self._settings.router.host, port)
        return port

    async def close(self) -> None:
        """Refuse new calls, let jobs end within the drain bound, hand over the rest, then give everything back.

        A second call joins the first.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"{self._name}: close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        drain_s = self._settings.router.drain_timeout_s
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            # What is left at the bound is told so by the drain; grpc's own cut comes after that.
            stopping = asyncio.create_task(self._server.stop(drain_s + LEAVING_S))
            await self._supervisor.drain(drain_s)
            await stopping
        else:
            await self._supervisor.drain(0)
        if self._probes is not None:
            await self._probes.stop(0)
        await self._generation.close(1.0)
        await self._look.close()
        await self._heartbeat.close()
        await self._doorbell.close()
        await self._replicas.close()
        try:
            await self._store.leave_router(self._name)
        except EaselError as error:
            logger.warning("router %s: its lease is left to run out: %s", self._name, error)
        await self._store.close()

    async def _listen(self) -> tuple[grpc.aio.Server, int]:
        """Bind and start. A router that Serve replaces may hold the port a moment longer."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + PORT_PATIENCE_S
        host, port = self._settings.router.host, self._settings.router.port
        while True:
            server = self._server_with_services()
            try:
                bound = self._door.bind(server, f"{host}:{port}")
                await server.start()
            except RuntimeError as error:
                await server.stop(None)
                if loop.time() >= give_up_s:
                    taken = f"router.port: {host}:{port} cannot be bound; free it or choose another port"
                    raise StartupError(taken) from error
                await asyncio.sleep(PORT_RETRY_S)
            else:
                return server, bound

    def _server_with_services(self) -> grpc.aio.Server:
        server = self._door.server(CallWatch(self._telemetry))
        generation_pb2_grpc.add_GenerationServicer_to_server(self._generation, server)
        jobs = JobService(self._intake, self._store)
        jobs_pb2_grpc.add_JobsServicer_to_server(jobs, server)
        status = ClusterService(
            self._store,
            queue_limit=self._settings.state.queue_limit,
            version=__version__,
            pending=self._pending,
            denoisers=self._settings.denoiser,
        )
        cluster_pb2_grpc.add_ClusterServicer_to_server(status, server)
        add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            [*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            server,
        )
        return server

    async def _beat(self) -> None:
        """Renew the lease, and say by the health service whether a job could run now."""
        try:
            await self._supervisor.reconcile(await self._store.heartbeat_router(self._name))
            view = await self._store.view()
            tell_cluster(self._telemetry.recorder, view, await self._store.waiting())
        except EaselError:
            await self._say(serving=False)
            raise
        live = [row for row in view.replicas if row.lease_ms > 0]
        self._replicas.keep_only(frozenset(row.address for row in live))
        self._takes_jobs = frozenset(row.address for row in live if not row.draining)
        if self._on_view is not None:
            self._on_view(view)
        # With no replica at all a job is taken too, where it wakes the first one.
        wakes = self._settings.denoiser.least_replicas == 0
        await self._say(serving=wakes or bool(self._takes_jobs))

    async def _say(self, *, serving: bool) -> None:
        """Whether a job could run now; and by READINESS, whether a replica answers, with or without Redis.

        Where a job wakes the first replica, a router without any must get that job.
        """
        known = health_pb2.HealthCheckResponse
        sleeps = not self._takes_jobs and self._settings.denoiser.least_replicas == 0
        told = dict.fromkeys(("", *SERVICES), serving)
        told[READINESS] = sleeps or self._replicas.answer(self._takes_jobs)
        for service, well in told.items():
            await self._health.set(service, known.SERVING if well else known.NOT_SERVING)


def _served_card(settings: Settings) -> ModelCard:
    """The model as its replicas serve it: a request is checked against the context that they have room for."""
    card, limit = read_checkpoint(Path(settings.checkpoint)).card, settings.denoiser.max_context_tokens
    return card if limit is None else replace(card, max_context_tokens=min(limit, card.max_context_tokens))
