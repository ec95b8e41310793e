"""Redis that is down, hangs, restarts, forgets its scripts, or refuses the password."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from cluster.core import FinishReason
from cluster.errors import ConfigError, Unavailable
from cluster.jobs.connection import connect, redis_errors, without_password
from cluster.jobs.records import Checkpoint
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import BROKEN, hello, new_job, running

BOUND_S = 10.0
LEASE_MS = 500
CHECKPOINT = Checkpoint(version="v1", canvas_index=0, step=3, payload=b"tokens")


async def refuse_everything(store: JobStore) -> None:
    """Every call says Unavailable, and when to come back, within the bound."""
    calls = (
        store.ping(),
        store.submit(new_job()),
        store.assign(),
        store.placement("job"),
        store.commit("job", 1, 0, b"c", tokens=1, denoising_steps=1, finish=FinishReason.EOS),
        store.heartbeat_replica(hello()),
        store.heartbeat_router("router-1"),
        store.look("router-1"),
        store.release("job", 1, AttemptEnd.DRAINED, "drained", checkpoint=CHECKPOINT),
        store.reap("job", 1, AttemptEnd.REPLICA_LOST, "killed"),
        store.save_checkpoint("job", 1, CHECKPOINT),
        store.checkpoint("job"),
        store.finish("job", 1, FinishReason.EOS),
        store.fail("job", BROKEN),
        store.cancel("job"),
        store.drain_replica("replica-1"),
        store.leave_replica("replica-1", AttemptEnd.DRAINED, "left"),
        store.leave_router("router-1"),
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
    store = JobStore(connect(own_server.url, timeout_s=1.0), retry_after_ms=300)
    await store.ping()
    with frozen(own_server):
        await refuse_everything(store)
    await store.ping()
    await store.close()


@contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Redis accepts connections and answers nothing."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def dead(server: RedisServer) -> Iterator[None]:
    """Redis is killed, and started again."""
    server.kill()
    try:
        yield
    finally:
        server.start()


@pytest.mark.parametrize("away", [frozen, dead])
async def test_an_outage_longer_than_a_lease_takes_no_job_from_anybody(
    own_server: RedisServer, away: Callable[[RedisServer], AbstractContextManager[None]]
) -> None:
    store = JobStore(connect(own_server.url, timeout_s=0.3), lease_ms=LEASE_MS)
    await store.heartbeat_router("router-1")
    epoch = (await running(store)).epoch
    await store.submit(new_job("waits"))
    await store.commit("job", epoch, 0, b"first", tokens=1, denoising_steps=1)
    with away(own_server):
        refused = 0
        async with asyncio.timeout(BOUND_S):
            outage = asyncio.create_task(asyncio.sleep(3 * LEASE_MS / 1000))
            while not outage.done():
                with pytest.raises(Unavailable):
                    await store.commit("job", epoch, 1, b"second", tokens=1, denoising_steps=1)
                refused += 1
                await asyncio.sleep(0.05)
    assert refused > 1
    # A router is the first one to be back; the leases of the others have ended.
    assert await store.look("router-2") == ()
    # The same commit under the same epoch. Redis may have taken it before: one that waited in a frozen server's socket.
    await store.commit("job", epoch, 1, b"second", tokens=1, denoising_steps=1)
    record = await store.get("job")
    assert (record.state, record.epoch, record.attempts) == (JobState.RUNNING, epoch, 1)
    assert record.history == ()
    assert await store.canvases("job") == [b"first", b"second"]
    assert (await store.get("waits")).router == "router-1"
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


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://host:port/0", "redis://host?a=b"])
def test_a_bad_url_is_a_config_error_that_names_it(url: str) -> None:
    with pytest.raises(ConfigError, match=f"redis url is '{re.escape(url)}'"):
        connect(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:secret@host:1/0", "redis://***@host:1/0"),
        ("redis://me:sec/ret@host:1/0", "redis://***@host:1/0"),
        ("redis://me:sec@ret@host:1/0", "redis://***@host:1/0"),
        ("redis://host:1/0?password=secret&db=1", "redis://host:1/0?password=***&db=1"),
        ("me:secret@host", "***@host"),
        ("redis://host:1/0", "redis://host:1/0"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("url", ["http://me:secret@host", "redis://me:secret/2@host", "me:secret@host"])
def test_a_bad_url_does_not_tell_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url)
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


@pytest.mark.parametrize(
    "said",
    [
        "MISCONF Errors writing to the AOF file: No space left on device",
        "NOREPLICAS Not enough good replicas to write.",
        "BUSY Redis is busy running a script.",
        "Error running script (call to f_0): @user_script:1: @user_script: 1: -READONLY You can't write",
    ],
)
async def test_a_redis_that_says_it_cannot_serve_is_unavailable(said: str) -> None:
    with pytest.raises(Unavailable, match="cannot be used now") as caught, redis_errors(300):
        raise ResponseError(said)
    assert caught.value.retry_after_ms == 300


async def test_what_a_script_refuses_passes_through() -> None:
    with pytest.raises(ResponseError, match="STALE_EPOCH"), redis_errors(300):
        raise ResponseError("STALE_EPOCH the job BUSY is at epoch 2")


@pytest.mark.parametrize("name", ["queue_limit", "lease_ms", "retention_s"])
async def test_a_limit_below_one_is_a_config_error(redis: Redis, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        JobStore(redis, **{"queue_limit": 1, "lease_ms": 1, "retention_s": 1, name: 0})  # type: ignore[arg-type]
