"""Rings arrive, and arrive again after the connection was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.errors import Unavailable
from cluster.jobs.connection import connect
from cluster.jobs.doorbell import Bell, Doorbell
from cluster.jobs.keys import Keys
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import BROKEN, new_job, running

BOUND_S = 10.0


class Rings:
    """What one process heard."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def __call__(self, kind: str, job_id: str) -> None:
        self.heard.put_nowait((kind, job_id))

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(BOUND_S):
            return await self.heard.get()


@pytest.fixture
async def listen(redis: Redis, namespace: str) -> AsyncIterator[Callable[..., asyncio.Future[Rings]]]:
    opened: list[Doorbell] = []

    async def start(name: str) -> Rings:
        doorbell, rings = Doorbell(redis, namespace=namespace), Rings()
        opened.append(doorbell)
        doorbell.on_ring(rings)
        await doorbell.start(name)
        return rings

    yield lambda name: asyncio.ensure_future(start(name))
    for doorbell in opened:
        await doorbell.close()


@pytest.fixture
async def doorbell(redis: Redis, namespace: str) -> AsyncIterator[Doorbell]:
    opened = Doorbell(redis, namespace=namespace)
    await opened.start("router-1")
    yield opened
    await opened.close()


async def kill_subscriptions(redis: Redis) -> None:
    await redis.client_kill_filter(_type="pubsub")


async def test_the_owner_hears_of_the_assignment_of_its_job(
    store: JobStore, listen: Callable[[str], asyncio.Future[Rings]]
) -> None:
    router, other = await listen("router-1"), await listen("router-2")
    first = await running(store, "first")
    assert await router.next() == ("assigned", "first")
    await store.submit(new_job("second"))
    await store.finish("first", first.epoch, FinishReason.EOS)
    assert await router.next() == ("assigned", "second")
    assert other.heard.empty()


async def test_a_cancel_is_told_to_the_replica_and_the_owner(
    store: JobStore, listen: Callable[[str], asyncio.Future[Rings]]
) -> None:
    router, replica = await listen("router-1"), await listen("replica-1")
    await running(store, "runs")
    await store.submit(new_job("waits"))
    await store.cancel("waits")
    await store.cancel("runs")
    assert [await router.next() for _ in range(3)] == [
        ("assigned", "runs"),
        ("cancelled", "waits"),
        ("cancelled", "runs"),
    ]
    assert await replica.next() == ("cancelled", "runs")
    assert replica.heard.empty()


async def test_a_failure_is_told_to_the_owner_and_by_the_owner_to_the_replica(
    store: JobStore, listen: Callable[[str], asyncio.Future[Rings]]
) -> None:
    router, replica = await listen("router-1"), await listen("replica-1")
    first = await running(store, "first")
    await store.fail("first", BROKEN, epoch=first.epoch)
    await running(store, "second")
    await store.fail("second", BROKEN)
    await store.submit(new_job("third", timeout_ms=1))
    heard = [await router.next() for _ in range(4)]
    assert heard == [
        ("assigned", "first"),
        ("failed", "first"),
        ("assigned", "second"),
        ("failed", "second"),
    ]
    assert await replica.next() == ("failed", "second")


async def test_a_deadline_that_passes_in_the_queue_is_told_to_the_owner(
    store: JobStore, listen: Callable[[str], asyncio.Future[Rings]]
) -> None:
    router = await listen("router-1")
    await store.submit(new_job("hurried", timeout_ms=1))
    await asyncio.sleep(0.01)
    await store.assign()
    assert await router.next() == ("failed", "hurried")


async def test_a_watcher_hears_commits_and_the_end(store: JobStore, doorbell: Doorbell) -> None:
    epoch = (await running(store)).epoch
    async with doorbell.watch("job") as bell, doorbell.watch("job") as second:
        assert not await bell.wait(0.0)
        await store.commit("job", epoch, 0, b"c", tokens=1, denoising_steps=1)
        assert await bell.wait(BOUND_S)
        assert await second.wait(BOUND_S)
        await store.finish("job", epoch, FinishReason.EOS)
        assert await bell.wait(BOUND_S)


async def test_a_watch_can_be_left_and_entered_again(store: JobStore, doorbell: Doorbell) -> None:
    epoch = (await running(store)).epoch
    for index in range(3):
        async with doorbell.watch("job") as bell:
            await store.commit("job", epoch, index, b"c", tokens=1, denoising_steps=1)
            assert await bell.wait(BOUND_S)


async def test_a_lost_connection_rings_every_bell_and_listens_again(
    store: JobStore, redis: Redis, doorbell: Doorbell, namespace: str
) -> None:
    rings = Rings()
    doorbell.on_ring(rings)
    async with doorbell.watch("job") as bell:
        await kill_subscriptions(redis)
        # It rings by itself when it is back: what happened in between was not heard.
        assert await bell.wait(BOUND_S)
        epoch = (await running(store)).epoch
        assert await rings.next() == ("assigned", "job")
        await store.commit("job", epoch, 0, b"c", tokens=1, denoising_steps=1)
        assert await bell.wait(BOUND_S)
    own = Keys(namespace).process_bell("router-1").encode()
    for _ in range(500):
        left = await redis.pubsub_channels(f"{Keys(namespace).base}*")
        if left == [own]:
            break
        await asyncio.sleep(0.01)
    assert left == [own]


async def test_a_restart_of_redis_is_survived(own_server: RedisServer) -> None:
    store = JobStore(connect(own_server.url))
    redis = connect(own_server.url)
    doorbell = Doorbell(redis)
    await doorbell.start("router-1")
    async with doorbell.watch("job") as bell:
        own_server.restart()
        assert await bell.wait(BOUND_S)
        epoch = (await running(store)).epoch
        await store.commit("job", epoch, 0, b"c", tokens=1, denoising_steps=1)
        assert await bell.wait(BOUND_S)
    await doorbell.close()
    await doorbell.close()
    await redis.aclose()
    await store.close()


async def test_a_redis_that_is_down_at_start_is_unavailable(own_server: RedisServer) -> None:
    own_server.stop()
    redis = connect(own_server.url)
    doorbell = Doorbell(redis)
    with pytest.raises(Unavailable):
        await doorbell.start("router-1")
    await doorbell.close()
    await redis.aclose()


async def test_what_a_callback_raises_does_not_end_the_doorbell(store: JobStore, doorbell: Doorbell) -> None:
    caught: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context["exception"]))

    def broken(kind: str, job_id: str) -> None:
        raise RuntimeError(kind)

    rings = Rings()
    doorbell.on_ring(broken)
    doorbell.on_ring(rings)
    await running(store)
    assert await rings.next() == ("assigned", "job")
    await store.cancel("job")
    assert await rings.next() == ("cancelled", "job")
    assert [str(error) for error in caught] == ["assigned", "cancelled"]


async def test_closing_never_waits_for_a_silent_connection(
    redis: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence_s = 0.01
    monkeypatch.setattr("cluster.jobs.doorbell._SILENCE_S", silence_s)
    for number in range(60):
        doorbell = Doorbell(redis, namespace=namespace)
        await doorbell.start("router-1")
        task = doorbell._task
        assert task is not None
        # Around the moments when it asks for a sign of life: Python 3.11 may drop a cancellation that meets a send.
        await asyncio.sleep(silence_s * (1 + number % 4) + 0.0002 * (number % 11 - 5))
        await doorbell.close()
        assert task.done()


async def test_rings_between_two_waits_are_kept_as_one() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    assert await bell.wait(0.0)
    assert not await bell.wait(0.0)
