"""Waiting moves a job forward, level by level, and never takes a slot from anybody."""

from __future__ import annotations

from random import Random
from typing import cast

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.jobs.keys import Keys
from cluster.jobs.states import AttemptEnd
from cluster.jobs.store import JobStore
from cluster.policy.ordering import OLDEST, QueueEntry, parse_member, queue_member
from tests.redis.helpers import hello, new_job

BATCH, NORMAL, HIGH, URGENT = Priority


async def wait_long(store: JobStore, redis: Redis, namespace: str, *job_ids: str) -> None:
    """As if these had waited for one more aging_ms; then a router looks."""
    await redis.zadd(f"{Keys(namespace).base}:waiting", dict.fromkeys(job_ids, 1), xx=True)
    assert await store.assign() == 0


async def queue(redis: Redis, namespace: str) -> list[QueueEntry]:
    members = cast("list[bytes]", await redis.zrange(f"{Keys(namespace).base}:queue", 0, -1))
    return [parse_member(member.decode()) for member in members]


async def levels(redis: Redis, namespace: str) -> dict[str, int]:
    return {entry.job_id: entry.level for entry in await queue(redis, namespace)}


async def test_a_waiting_job_gains_a_level_at_a_time_up_to_the_oldest(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.submit(new_job("batch", priority=BATCH))
    await store.submit(new_job("fresh", priority=BATCH))
    seen = []
    for _ in range(6):
        await wait_long(store, redis, namespace, "batch")
        await store.assign()
        seen.append((await levels(redis, namespace))["batch"])
    assert seen == [2, 3, 4, OLDEST, OLDEST, OLDEST]
    assert (await levels(redis, namespace))["fresh"] == BATCH
    assert (await store.get("batch")).priority is BATCH


async def test_no_stream_of_urgent_jobs_keeps_a_job_waiting_for_ever(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello())
    await store.submit(new_job("urgent-0", priority=URGENT))
    await store.submit(new_job("batch", priority=BATCH))
    served = []
    for number in range(1, 5):
        await store.submit(new_job(f"urgent-{number}", priority=URGENT))
        await wait_long(store, redis, namespace, "batch")
        (now,) = (await store.heartbeat_replica(hello())).assigned
        await store.finish(now.job_id, now.epoch, FinishReason.EOS)
        served.append(now.job_id)
    # After three times aging_ms it is their equal, and it came before them.
    assert served == ["urgent-0", "urgent-1", "urgent-2", "batch"]


async def test_a_level_gained_gives_no_right_to_the_slot_of_another(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello())
    await store.submit(new_job("runs", priority=BATCH))
    await store.submit(new_job("waits", priority=BATCH))
    for _ in range(5):
        await wait_long(store, redis, namespace, "waits")
    (order,) = (await store.heartbeat_replica(hello())).assigned
    assert not order.preempt


@pytest.mark.parametrize("end", [end for end in AttemptEnd if end is not AttemptEnd.PREEMPTED])
async def test_a_level_gained_is_kept_when_the_job_comes_back(
    store: JobStore, redis: Redis, namespace: str, end: AttemptEnd
) -> None:
    await store.submit(new_job("batch", priority=BATCH))
    for _ in range(2):
        await wait_long(store, redis, namespace, "batch")
    await store.heartbeat_replica(hello())
    await store.drain_replica("replica-1")
    await store.submit(new_job("normal", priority=NORMAL))
    await store.release("batch", 1, end, "back")
    assert await levels(redis, namespace) == {"batch": HIGH, "normal": NORMAL}
    assert [entry.job_id for entry in await queue(redis, namespace)] == ["batch", "normal"]


async def test_a_job_that_gave_way_starts_again_from_its_priority(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.submit(new_job("batch", priority=BATCH))
    for _ in range(2):
        await wait_long(store, redis, namespace, "batch")
    await store.heartbeat_replica(hello())
    await store.drain_replica("replica-1")
    await store.release("batch", 1, AttemptEnd.PREEMPTED, "made room")
    assert await levels(redis, namespace) == {"batch": BATCH}
    await wait_long(store, redis, namespace, "batch")
    assert await levels(redis, namespace) == {"batch": NORMAL}


async def test_the_time_that_counts_begins_when_the_job_begins_to_wait(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello())
    await store.submit(new_job("runs", priority=BATCH))
    await wait_long(store, redis, namespace, "runs")
    await store.drain_replica("replica-1")
    await store.release("runs", 1, AttemptEnd.DRAINED, "drained")
    await store.assign()
    assert await levels(redis, namespace) == {"runs": BATCH}


@pytest.mark.parametrize("seed", range(5))
async def test_redis_orders_aged_jobs_as_the_policy_does(
    store: JobStore, redis: Redis, namespace: str, seed: int
) -> None:
    random = Random(seed)
    entries: dict[str, QueueEntry] = {}
    for number in range(20):
        job_id, priority = f"job-{number}", random.choice(list(Priority))
        await store.submit(new_job(job_id, priority=priority, timeout_ms=random.choice([None, 600_000, 900_000])))
        for entry in await queue(redis, namespace):
            entries.setdefault(entry.job_id, entry)
        assert entries[job_id].level == priority
    for _ in range(6):
        old = random.sample(sorted(entries), 8)
        await wait_long(store, redis, namespace, *old)
        entries |= {job_id: entries[job_id].aged() for job_id in old}
        assert await queue(redis, namespace) == sorted(entries.values(), key=queue_member)


async def test_a_deadline_that_passes_is_found_at_every_level(store: JobStore, redis: Redis, namespace: str) -> None:
    for number, priority in enumerate(Priority):
        await store.submit(new_job(f"late-{number}", priority=priority, timeout_ms=60_000))
        await store.submit(new_job(f"waits-{number}", priority=priority))
    await wait_long(store, redis, namespace, *(f"late-{number}" for number in range(4)))
    # The deadline is in the member: move the clock of each by hand.
    base = Keys(namespace).base
    for entry in await queue(redis, namespace):
        if entry.job_id.startswith("late"):
            late = queue_member(QueueEntry(entry.level, 1, entry.sequence, entry.job_id))
            await redis.zrem(f"{base}:queue", queue_member(entry))
            await redis.zadd(f"{base}:queue", {late: 0})
            await redis.hset(Keys(namespace).job(entry.job_id), "member", late)
    await store.assign()
    assert sorted(await levels(redis, namespace)) == [f"waits-{number}" for number in range(4)]
