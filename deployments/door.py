"""How calls come in: TLS, credentials, limits on callers, and the plaintext port for probes."""

from __future__ import annotations

import logging

import grpc
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from cluster.config import Settings
from cluster.errors import StartupError
from cluster.rpc.auth import AuthInterceptor
from cluster.rpc.interceptors import EdgeInterceptor
from cluster.rpc.options import connection_age, limit_options, server_options
from cluster.security.gate import Gate
from cluster.security.tls import PeerTls, ServerTls

logger = logging.getLogger(__name__)

# A probe is a few bytes.
_PROBE_MAX_BYTES = 4096


class Door:
    """The public port of one router, as its settings want it."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError for certificates and keys that cannot be used."""
        security = settings.security
        self._router = settings.router
        self._tls = None if security.tls is None else ServerTls(security.tls)
        self._gate = Gate(security)
        self._quotas = security.quotas
        if self._tls is None and not self._gate.is_open:
            logger.warning("credentials travel in plain text: set security.tls, or end TLS in front of the routers")

    def server(self, *outer: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
        """A server without services and ports; `outer` see every call, also those that are refused."""
        router = self._router
        streams = self._quotas
        return grpc.aio.server(
            interceptors=(
                *outer,
                AuthInterceptor(self._gate, lambda tenant: streams.of(tenant).streams),
                EdgeInterceptor(max_request_bytes=router.max_request_bytes),
            ),
            options=(
                *server_options(router.max_request_bytes, share_port=True),
                *limit_options(router.max_connections, router.max_streams_per_connection),
                *connection_age(router.max_connection_age_s, router.max_connection_age_grace_s),
            ),
        )

    def bind(self, server: grpc.aio.Server, address: str) -> int:
        """Add the public port; returns its number. Raises RuntimeError when it cannot be bound."""
        if self._tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._tls.credentials())

    async def open_for_probes(self, health: health_aio.HealthServicer) -> grpc.aio.Server | None:
        """Serve the health service alone, in plain text, where the settings name a port for it.

        Raises StartupError when it cannot be bound.
        """
        router = self._router
        if router.health_port is None:
            return None
        options = (
            *server_options(_PROBE_MAX_BYTES, share_port=True),
            *limit_options(router.max_connections, router.max_streams_per_connection),
        )
        server = grpc.aio.server(options=options)
        add_HealthServicer_to_server(health, server)
        try:
            port = server.add_insecure_port(f"{router.host}:{router.health_port}")
        except RuntimeError as error:
            taken = f"router.health_port: {router.host}:{router.health_port} cannot be bound"
            raise StartupError(f"{taken}; free it or choose another port") from error
        await server.start()
        logger.info("probes are answered on %s:%d", router.host, port)
        return server


def internal_tls(settings: Settings) -> PeerTls | None:
    """How routers dial replicas; None for plain text. Raises ConfigError for files that cannot be used."""
    given = settings.security.internal_tls
    return None if given is None else PeerTls(given)


def bind_internal(server: grpc.aio.Server, address: str, settings: Settings) -> int:
    """Add a replica's port; returns its number.

    Raises RuntimeError when it cannot be bound, ConfigError for files that cannot be used.
    """
    given = settings.security.internal_tls
    if given is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, ServerTls(given).credentials())
