"""Redis behind a Sentinel: a failover is an outage with an end, and nothing goes to the old master afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from redis.asyncio import SSLConnection

from cluster.core import FinishReason
from cluster.errors import ConfigError, Unavailable
from cluster.jobs.connection import connect, without_password
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.sentinel import MasterPool
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import HOST, RedisServer, free_port
from tests.redis.failover import BOUND_S, SERVICE, FailoverSet, ask, until
from tests.redis.helpers import new_job, running

Result = TypeVar("Result")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[FailoverSet]:
    made = FailoverSet(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailoverSet]:
    """One set for the tests that leave it as it is."""
    made = FailoverSet(tmp_path_factory.mktemp("calm"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
async def store(nodes: FailoverSet) -> AsyncIterator[JobStore]:
    opened = JobStore(connect(nodes.url, timeout_s=1.0), retry_after_ms=300, lease_ms=60_000)
    yield opened
    await opened.close()


async def once_it_works(call: Callable[[], Awaitable[Result]]) -> tuple[Result, int]:
    """What the call returns as soon as it does, and how often it was Unavailable first; anything else is raised."""
    refusals: list[Unavailable] = []
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                result = await call()
            except Unavailable as error:
                refusals.append(error)
                await asyncio.sleep(0.05)
            else:
                assert {refusal.retry_after_ms for refusal in refusals} <= {300}
                return result, len(refusals)


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP], ids=lambda fate: fate.name)
async def test_a_lost_master_is_unavailable_until_its_replica_serves_all_that_was_replicated(
    nodes: FailoverSet, store: JobStore, fate: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.jobs.doorbell._SILENCE_S", 0.5)
    redis, rings = connect(nodes.url, timeout_s=1.0), asyncio.Queue[tuple[str, str]]()
    doorbell = Doorbell(redis)
    doorbell.on_ring(lambda kind, job_id: rings.put_nowait((kind, job_id)))
    await doorbell.start("router-1")
    epoch = (await running(store, slots=2)).epoch
    await store.commit("job", epoch, 0, b"first", tokens=1, denoising_steps=1)
    async with doorbell.watch("job") as bell:
        nodes.replicated()
        os.kill(nodes.master.pid, fate)
        record, refused = await once_it_works(lambda: store.get("job"))
        assert (record.state, record.epoch, record.canvases) == (JobState.RUNNING, epoch, 1)
        assert refused > 0
        assert nodes.named() == nodes.replica.port
        await once_it_works(
            lambda: store.commit("job", epoch, 1, b"second", tokens=1, denoising_steps=1, finish=FinishReason.EOS)
        )
        assert await store.canvases("job") == [b"first", b"second"]
        assert await bell.wait(BOUND_S)
    await once_it_works(lambda: store.submit(new_job("next")))
    async with asyncio.timeout(BOUND_S):
        while await rings.get() != ("assigned", "next"):
            pass
    await doorbell.close()
    await redis.aclose()


async def test_a_master_that_is_replaced_but_lives_on_is_left_by_every_connection(
    nodes: FailoverSet, store: JobStore
) -> None:
    await running(store)
    # Many connections are open to the old master when it stops being one.
    await asyncio.gather(*(once_it_works(lambda: store.get("job")) for _ in range(32)))
    nodes.replicated()
    until("the Sentinel to agree", lambda: bool(ask(nodes.sentinel_port, "SENTINEL FAILOVER", SERVICE)))
    until("the Sentinel to name the replica", lambda: nodes.named() == nodes.replica.port)
    number = 0
    async with asyncio.timeout(BOUND_S):
        # What the old master takes from now on reaches nobody.
        while not ask(nodes.replica.port, "EXISTS", f"{{easel}}:job:job-{number}"):
            number += 1
            await once_it_works(lambda number=number: store.submit(new_job(f"job-{number}")))  # type: ignore[misc]
            await asyncio.sleep(0.05)
    records = await asyncio.gather(*(once_it_works(lambda: store.get(f"job-{number}")) for _ in range(32)))
    assert {record.state for record, _ in records} == {JobState.QUEUED}


async def test_a_node_that_takes_no_more_writes_is_left(nodes: FailoverSet, store: JobStore) -> None:
    await running(store)
    nodes.stop_sentinel()
    # By hand, so that nobody closes the connections for us.
    ask(nodes.master.port, "REPLICAOF", HOST, nodes.replica.port)
    with pytest.raises(Unavailable, match="no Sentinel names a master"):
        await store.submit(new_job("next"))


async def test_a_master_that_lost_its_replicas_is_unavailable(nodes: FailoverSet, store: JobStore) -> None:
    await running(store)
    ask(nodes.master.port, "CONFIG", "SET", "min-replicas-to-write", "2")
    with pytest.raises(Unavailable, match="NOREPLICAS"):
        await store.submit(new_job("next"))


async def test_a_node_that_is_not_the_master_it_is_said_to_be_is_refused(nodes: FailoverSet) -> None:
    ask(nodes.master.port, "REPLICAOF", HOST, nodes.replica.port)
    store = JobStore(connect(nodes.url), retry_after_ms=300)
    with pytest.raises(Unavailable, match="is not the master"):
        await store.get("job")
    await store.close()


async def test_calls_beyond_the_connection_limit_wait_for_their_turn(calm: FailoverSet) -> None:
    redis = connect(calm.url)
    pool = redis.connection_pool
    assert isinstance(pool, MasterPool)
    replies = await asyncio.gather(*(redis.ping() for _ in range(4 * pool.max_connections)))
    assert all(replies)
    assert len(ask(calm.master.port, "CLIENT LIST")) <= pool.max_connections + 10
    await redis.aclose()


async def test_a_sentinel_that_does_not_answer_is_passed_over(calm: FailoverSet) -> None:
    url = calm.url.replace("redis+sentinel://", f"redis+sentinel://{HOST}:{free_port()},")
    store = JobStore(connect(url))
    await store.ping()
    await store.close()


async def test_sentinels_that_are_gone_or_know_no_such_service_are_unavailable(calm: FailoverSet) -> None:
    gone = f"redis+sentinel://{HOST}:{free_port()}/{SERVICE}/0"
    for url, said in ((gone, "Connect call failed"), (calm.url.replace(SERVICE, "other"), "knows no such service")):
        store = JobStore(connect(url), retry_after_ms=300)
        with pytest.raises(Unavailable, match="no Sentinel names a master") as caught:
            await store.ping()
        assert said in str(caught.value)
        assert caught.value.retry_after_ms == 300
        await store.close()


async def test_a_sentinel_that_hangs_is_unavailable_within_the_timeout(own_server: RedisServer) -> None:
    store = JobStore(connect(f"redis+sentinel://{HOST}:{own_server.port}/{SERVICE}", timeout_s=0.2))
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(BOUND_S):
            with pytest.raises(Unavailable, match=r"did not answer in time|Timeout"):
                await store.ping()
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    await store.close()


async def test_a_plain_redis_that_is_taken_for_a_sentinel_is_said_to_know_nothing(calm: FailoverSet) -> None:
    store = JobStore(connect(f"redis+sentinel://{HOST}:{calm.master.port}/{SERVICE}"))
    with pytest.raises(Unavailable, match="unknown command"):
        await store.ping()
    await store.close()


async def test_a_password_of_the_nodes_is_needed_and_taken(nodes: FailoverSet) -> None:
    ask(nodes.master.port, "CONFIG", "SET", "requirepass", "secret")
    for user in ("", ":wrong@"):
        await is_refused(nodes.url.replace("//", f"//{user}"), "Redis refuses the credentials of the redis url: ")
    store = JobStore(connect(nodes.url.replace("//", "//:secret@")))
    await store.ping()
    await store.close()


async def test_a_password_of_the_sentinels_is_another_one(own_server: RedisServer) -> None:
    ask(own_server.port, "CONFIG", "SET", "requirepass", "hush")
    url = f"redis+sentinel://:secret@{HOST}:{own_server.port}/{SERVICE}"
    for option in ("", "?sentinel_password=secret"):
        await is_refused(url + option, f"Sentinel {HOST}:{own_server.port} says: ")
    store = JobStore(connect(f"{url}?sentinel_password=hush"))
    with pytest.raises(Unavailable, match="unknown command"):
        await store.ping()
    await store.close()


async def is_refused(url: str, said: str) -> None:
    store = JobStore(connect(url))
    with pytest.raises(ConfigError, match=said):
        await store.ping()
    await store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+sentinel://host:26379", "it names no service"),
        ("redis+sentinel://host:26379//0", "it names no service"),
        ("redis+sentinel:///easel/0", "it names no Sentinel"),
        ("redis+sentinel://host:26379,,other/easel", "'' is not host:port"),
        ("redis+sentinel://host:port/easel", "its port is not a number"),
        ("redis+sentinel://host:26379/easel/zero", "the database is 'zero'; it must be a number"),
        ("redis+sentinel://host:26379/easel?colour=red", "unexpected keyword argument 'colour'"),
        ("sentinel://host:26379/easel", "must specify one of"),
    ],
)
def test_a_bad_sentinel_url_is_a_config_error_that_says_what_is_allowed(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url)
    assert str(caught.value).startswith(f"redis url is '{url}': ")
    assert said in str(caught.value)
    assert "redis+sentinel://[user:password@]host:26379,host:26379/SERVICE/DB" in str(caught.value)


def test_no_password_of_a_sentinel_url_is_ever_shown() -> None:
    url = "rediss+sentinel://me:secret@one:1,two:2/easel/0?sentinel_password=hush"
    assert without_password(url) == "rediss+sentinel://***@one:1,two:2/easel/0?sentinel_password=***"


def test_a_tls_url_means_tls_to_the_nodes() -> None:
    pool = connect("rediss+sentinel://me:secret@one:1/easel/3?ssl_cert_reqs=none").connection_pool
    connection = pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    assert isinstance(connection, SSLConnection)
    assert (connection.username, connection.password, connection.db) == ("me", "secret", 3)
