"""Redis that is down, hangs, restarts, forgets its scripts, or refuses the password."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.errors import ConfigError, Unavailable
from cluster.jobs.connection import connect, redis_errors, without_password
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import hello, new_job, running

BOUND_S = 10.0


async def refuse_everything(store: JobStore) -> None:
    """Every call says Unavailable, and when to come back, within the bound."""
    calls = (
        store.ping(),
        store.submit(new_job()),
        store.assign(),
        store.placement("job"),
        store.commit("job", 1, 0, b"c", tokens=1, denoising_steps=1, finish=FinishReason.EOS),
        store.heartbeat_replica(hello()),
        store.remove_replica("replica-1"),
        store.remove_router("router-1"),
        store.get("job"),
        store.canvases("job"),
        store.list(page_size=1),
        store.view(),
    )
    async with asyncio.timeout(BOUND_S):
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * len(calls)
    assert {answer.retry_after_ms for answer in answers if isinstance(answer, Unavailable)} == {300}


async def test_a_redis_that_is_down_is_unavailable_and_then_back(own_server: RedisServer) -> None:
    store = JobStore(connect(own_server.url, timeout_s=1.0), retry_after_ms=300)
    epoch = (await running(store)).epoch
    own_server.stop()
    await refuse_everything(store)
    own_server.restart()
    async with asyncio.timeout(BOUND_S):
        await store.commit("job", epoch, 0, b"c", tokens=1, denoising_steps=1, finish=FinishReason.EOS)
    assert (await store.get("job")).state is JobState.SUCCEEDED
    await store.close()


async def test_a_redis_that_hangs_is_unavailable_within_the_timeout(own_server: RedisServer) -> None:
    store = JobStore(connect(own_server.url, timeout_s=0.3), retry_after_ms=300)
    await store.ping()
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        await refuse_everything(store)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    await store.ping()
    await store.close()


async def test_a_killed_redis_keeps_what_it_accepted(own_server: RedisServer) -> None:
    store = JobStore(connect(own_server.url))
    for number in range(20):
        await store.submit(new_job(f"job-{number}"))
    own_server.kill()
    own_server.restart()
    assert (await store.view()).queued == 20
    await store.close()


async def test_forgotten_scripts_are_loaded_again(store: JobStore, redis: Redis) -> None:
    await store.heartbeat_replica(hello(slots=2))
    await redis.script_flush()
    created, placement = await store.submit(new_job())
    assert created
    assert placement is not None
    await redis.script_flush()
    await store.commit("job", placement.epoch, 0, b"c", tokens=1, denoising_steps=1)
    await redis.script_flush()
    await asyncio.gather(*(store.submit(new_job(f"job-{number}")) for number in range(20)))
    assert (await store.view()).queued == 19


async def test_a_cancellation_that_meets_a_finished_send_is_not_lost() -> None:
    sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def call() -> None:
        with redis_errors(1000):
            await asyncio.wait_for(sent, BOUND_S)

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    # Both in one turn of the loop: Python 3.11 alone would return as if nothing had been cancelled.
    sent.set_result(None)
    task.cancel()
    await asyncio.wait({task}, timeout=BOUND_S)
    assert task.cancelled()


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://host:port/0"])
def test_a_bad_url_is_a_config_error_that_names_it(url: str) -> None:
    with pytest.raises(ConfigError, match=f"redis url is '{url}'"):
        connect(url)


def test_a_password_is_never_shown() -> None:
    assert without_password("redis://me:secret@host:1/0") == "redis://***@host:1/0"
    with pytest.raises(ConfigError) as caught:
        connect("http://me:secret@host")
    assert "secret" not in str(caught.value)


async def test_a_wrong_password_is_a_config_error(own_server: RedisServer) -> None:
    store = JobStore(connect(own_server.url.replace("redis://", "redis://:wrong@")))
    with pytest.raises(ConfigError, match="refuses the credentials"):
        await store.ping()
    await store.close()


async def test_a_missing_password_is_a_config_error(own_server: RedisServer) -> None:
    admin = connect(own_server.url)
    await admin.config_set("requirepass", "secret")
    store = JobStore(connect(own_server.url))
    with pytest.raises(ConfigError, match="refuses the credentials"):
        await store.ping()
    # Later calls are refused too; Redis 7 hangs up on them instead of saying why.
    with pytest.raises((ConfigError, Unavailable)):
        await store.submit(new_job())
    await store.close()
    await admin.aclose()


async def test_a_full_redis_is_unavailable(own_server: RedisServer) -> None:
    admin = connect(own_server.url)
    store = JobStore(connect(own_server.url))
    await store.ping()
    await admin.config_set("maxmemory", "1")
    with pytest.raises(Unavailable):
        await store.submit(new_job())
    with pytest.raises(Unavailable):
        await store.heartbeat_replica(hello())
    await admin.aclose()
    await store.close()


@pytest.mark.parametrize("name", ["queue_limit", "lease_ms", "retention_s"])
async def test_a_limit_below_one_is_a_config_error(redis: Redis, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        JobStore(redis, **{"queue_limit": 1, "lease_ms": 1, "retention_s": 1, name: 0})  # type: ignore[arg-type]
