"""Images of jobs in Redis: stored with the job, counted, and forgotten when it ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.errors import QueueFull
from cluster.jobs.keys import Keys
from cluster.jobs.records import NewJob
from cluster.jobs.states import AttemptEnd
from cluster.jobs.store import JobStore
from tests.redis.helpers import BROKEN, hello, new_job

IMAGES = b"\x00images\xff"
LIMIT_BYTES = 3 * len(IMAGES)


def seeing(job_id: str = "job") -> NewJob:
    return replace(new_job(job_id), images=IMAGES)


async def counted(redis: Redis, namespace: str) -> int:
    return int(await redis.get(f"{Keys(namespace).base}:image_bytes") or 0)


async def finished(store: JobStore) -> None:
    await store.finish("job", 1, FinishReason.EOS)


async def failed(store: JobStore) -> None:
    await store.fail("job", BROKEN)


async def cancelled(store: JobStore) -> None:
    await store.cancel("job")


async def lost_too_often(store: JobStore) -> None:
    for epoch in (1, 2, 3):
        await store.reap("job", epoch, AttemptEnd.REPLICA_LOST, "lost")
        await store.heartbeat_replica(hello(f"fresh-{epoch}"))
        await store.assign()


@pytest.mark.parametrize("end", [finished, failed, cancelled, lost_too_often])
async def test_images_are_there_until_their_job_ends_however_it_ends(
    store: JobStore, redis: Redis, namespace: str, end: Callable[[JobStore], Awaitable[None]]
) -> None:
    await store.heartbeat_replica(hello())
    await store.submit(seeing())
    assert await store.images("job") == IMAGES
    assert await counted(redis, namespace) == len(IMAGES)
    await end(store)
    assert (await store.get("job")).state.terminal
    assert await store.images("job") is None
    assert await counted(redis, namespace) == 0


async def test_a_job_that_goes_back_to_the_queue_keeps_its_images(store: JobStore) -> None:
    await store.heartbeat_replica(hello())
    await store.submit(seeing())
    await store.release("job", 1, AttemptEnd.DRAINED, "drained")
    assert await store.images("job") == IMAGES


async def test_asking_again_stores_and_counts_nothing_more(store: JobStore, redis: Redis, namespace: str) -> None:
    for _ in range(2):
        await store.submit(seeing())
    assert await counted(redis, namespace) == len(IMAGES)


async def test_a_job_without_images_has_none(store: JobStore, redis: Redis, namespace: str) -> None:
    await store.submit(new_job())
    assert await store.images("job") is None
    await store.cancel("job")
    assert await redis.exists(f"{Keys(namespace).base}:image_bytes") == 0


async def test_images_beyond_the_limit_are_refused_until_others_have_ended(redis: Redis, namespace: str) -> None:
    bounded = JobStore(redis, namespace=namespace, image_limit_bytes=LIMIT_BYTES)
    for number in range(3):
        await bounded.submit(seeing(f"job-{number}"))
    with pytest.raises(QueueFull, match="the images of jobs that have not ended") as caught:
        await bounded.submit(seeing("one-more"))
    assert caught.value.retry_after_ms is not None
    await bounded.submit(new_job("text"))
    await bounded.cancel("job-1")
    await bounded.submit(seeing("one-more"))
