"""Redis behind Sentinels: every connection goes to the node that they name as the master of a service.

    redis+sentinel://[user:password@]host[:26379],host[:26379]/SERVICE[/DB][?sentinel_password=...]

User and password are those of the data nodes; `sentinel_username` and `sentinel_password` are for Sentinels that ask
for their own. rediss+sentinel:// speaks TLS to the data nodes and to the Sentinels, and takes the ssl_ options of
rediss://.

A new connection asks who the master is, and asks the node itself whether it agrees (the procedure of
https://redis.io/docs/latest/develop/reference/sentinel-clients/). While the pool is in use it asks again each second,
because an old master that lives on may take writes for some seconds more, and they would be lost. A connection is
dropped when it comes out of the pool and leads elsewhere, or when its node says that it takes no writes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.jobs.secrets import FreshTlsConnection

Address = tuple[str, int]

ALLOWED = "redis+sentinel://[user:password@]host:26379,host:26379/SERVICE/DB"
_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
_PORT = 26379
_ASK_AGAIN_S = 1.0
_CLOSE_S = 5.0
_TAKES_NO_WRITES = re.compile(r"(^|-)(READONLY|NOREPLICAS) ")
_REFUSED = (exceptions.AuthenticationError, exceptions.NoPermissionError)


class NoMaster(exceptions.RedisError):
    """No Sentinel names a master now: it is being replaced, or no Sentinel can be reached."""


class Sentinels:
    """The Sentinels of one service. Whoever makes it closes it."""

    def __init__(self, service: str, addresses: tuple[Address, ...], *, timeout_s: float, **options: Any) -> None:  # noqa: ANN401 - what Redis takes
        """`timeout_s` is shared by all of them: asking every one takes no longer than that."""
        self._share_s = share_s = timeout_s / len(addresses)
        settled: dict[str, Any] = {
            **options,
            "socket_timeout": share_s,
            "socket_connect_timeout": share_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "decode_responses": True,
        }
        self._service = service
        self._clients = {(host, port): Redis(host=host, port=port, **settled) for host, port in addresses}
        self._order = list(addresses)
        self.named: Address | None = None
        self._asking: asyncio.Task[Address] | None = None
        self._asked_s = 0.0

    async def master(self) -> Address:
        """The master's host and port by an answer that comes after this call begins or is on its way by then.

        Raises NoMaster, or AuthenticationError when a Sentinel refuses the credentials and no other knows.
        """
        return await asyncio.shield(self._question())

    def look_again(self) -> None:
        """Bring `named` up to date beside the caller: Sentinels that are gone must not hold up a living master."""
        if time.monotonic() - self._asked_s >= _ASK_AGAIN_S:
            self._question()

    async def close(self) -> None:
        """Close the connections to all of them."""
        if self._asking is not None:
            # Not cancelled: a question has a bound of its own.
            await asyncio.wait({self._asking}, timeout=_CLOSE_S)
        for client in self._clients.values():
            with suppress(exceptions.RedisError, OSError):
                await client.aclose()

    def _question(self) -> asyncio.Task[Address]:
        """One at a time: when a master dies, all connections want to know at once."""
        if self._asking is None or self._asking.done():
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask_all(), name="ask for the master")
            self._asking.add_done_callback(_noticed)
        return self._asking

    async def _ask_all(self) -> Address:
        refusals: dict[Address, Exception | None] = {}
        for asked in tuple(self._order):
            try:
                found = await self._ask(asked)
            except (exceptions.RedisError, TimeoutError) as error:
                refusals[asked] = error
                continue
            if found:
                # Who answers is asked first next time.
                self._order = [asked, *(other for other in self._order if other != asked)]
                self.named = (str(found[0]), int(found[1]))
                return self.named
            refusals[asked] = None
        raise _no_master(self._service, refusals)

    async def _ask(self, address: Address) -> Sequence[str | int] | None:
        command: Any = self._clients[address].execute_command  # redis-py leaves it untyped
        # Over connecting and answering together: redis-py bounds each of them by itself.
        async with asyncio.timeout(self._share_s):
            found: Sequence[str | int] | None = await command("SENTINEL GET-MASTER-ADDR-BY-NAME", self._service)
        return found


def _noticed(asking: asyncio.Task[Address]) -> None:
    """Read the error of a question that nobody waited for; whoever needs the answer asks again."""
    if not asking.cancelled():
        asking.exception()


def _no_master(service: str, refusals: dict[Address, Exception | None]) -> exceptions.RedisError:
    for (host, port), error in refusals.items():
        if isinstance(error, _REFUSED):
            return exceptions.AuthenticationError(f"Sentinel {host}:{port} says: {error}")
    said = (f"{host}:{port} {_said(error)}" for (host, port), error in refusals.items())
    return NoMaster(f"no Sentinel names a master of {service!r}: {'; '.join(said)}")


def _said(error: Exception | None) -> str:
    return "knows no such service" if error is None else str(error) or "did not answer in time"


class MasterConnection(Connection):
    """A connection that finds the master whenever it connects."""

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:  # noqa: ANN401 - what Connection takes
        super().__init__(**options)
        self._sentinels = sentinels

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Connect, as redis-py does it, to whom the Sentinels name. Raises NoMaster."""
        if not self.is_connected:
            self.host, self.port = await self._sentinels.master()
        await super().connect_check_health(check_health, retry_socket_connect)

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, and make sure that the node agrees that it is the master: Sentinels can be late."""
        await super().on_connect_check_health(check_health)
        await self.send_command("ROLE", check_health=False)
        # A user may lack the right to ask; a write will tell then.
        with suppress(exceptions.NoPermissionError):
            role = await self.read_response()
            if role[0] not in (b"master", "master"):
                raise exceptions.ConnectionError(
                    f"{self.host}:{self.port} is not the master, which Sentinel says it is"
                )

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - redis-py's own
        """Read a reply. A node that takes no writes is left: the next connection goes to the new master."""
        try:
            return await super().read_response(*args, **kwargs)
        except exceptions.ResponseError as error:
            if not isinstance(error, exceptions.ReadOnlyError) and not _TAKES_NO_WRITES.search(str(error)):
                raise
            await self.disconnect(nowait=True)
            raise exceptions.ConnectionError(f"{self.host}:{self.port} takes no writes: {error}") from error


class TlsMasterConnection(MasterConnection, FreshTlsConnection):
    """The same over TLS."""


class MasterPool(BlockingConnectionPool):
    """Connections to the master of one service. Owns `sentinels`."""

    def __init__(self, sentinels: Sentinels, **options: Any) -> None:  # noqa: ANN401 - what the pool takes
        super().__init__(sentinels=sentinels, **options)
        self._sentinels = sentinels

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Make sure that a connection leads to the master last named, before it is used."""
        self._sentinels.look_again()
        peer = (getattr(connection, "host", None), getattr(connection, "port", None))
        if connection.is_connected and peer != self._sentinels.named:
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)

    async def aclose(self) -> None:
        """Close every connection, and those to the Sentinels."""
        try:
            await super().aclose()
        finally:
            await self._sentinels.close()


def is_sentinel_url(url: str) -> bool:
    """True for a URL that `master_pool` takes."""
    return url.partition("://")[0] in _SCHEMES


def master_pool(url: str, *, timeout: float, **options: Any) -> MasterPool:  # noqa: ANN401 - what the pool takes
    """The pool for a redis+sentinel:// or rediss+sentinel:// URL. Raises ValueError for one it does not understand.

    `options` are those of BlockingConnectionPool; `timeout`, in seconds, bounds finding the master too.
    """
    parts = urlsplit(url)
    service, database = _service_of(parts)
    credentials, at, hosts = parts.netloc.rpartition("@")
    scheme = _SCHEMES[parts.scheme]
    # redis-py reads what a URL of one node has as well: credentials and options.
    given: dict[str, Any] = dict(parse_url(f"{scheme}://{credentials}{at}host/{database}?{parts.query}"))
    tls = {name: value for name, value in {**options, **given}.items() if name.startswith("ssl_")}
    own = {name: given.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    sentinels = Sentinels(service, _addresses(hosts), timeout_s=timeout, ssl=scheme == "rediss", **own, **tls)
    kind = TlsMasterConnection if scheme == "rediss" else MasterConnection
    settled = {name: value for name, value in given.items() if name not in ("host", "port", "connection_class")}
    return MasterPool(sentinels, **{**options, "timeout": timeout, **settled, "connection_class": kind})


def _service_of(parts: SplitResult) -> tuple[str, int]:
    service, _, database = parts.path.removeprefix("/").partition("/")
    if not service:
        raise ValueError("it names no service")
    if database and not database.isdecimal():
        raise ValueError(f"the database is {database!r}; it must be a number")
    return service, int(database or 0)


def _addresses(hosts: str) -> tuple[Address, ...]:
    found = []
    for item in hosts.split(","):
        one = urlsplit(f"//{item}")
        if not one.hostname:
            raise ValueError("it names no Sentinel" if not hosts else f"{item!r} is not host:port")
        found.append((one.hostname, one.port or _PORT))
    return tuple(dict.fromkeys(found))
