"""The order of the queue, its limit, and deadlines that pass in it."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.errors import QueueFull
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.policy.ordering import QueueEntry, parse_member, queue_member
from cluster.redis_server import RedisServer
from tests.redis.helpers import hello, new_job, running

PASSED = "the deadline passed while the job waited for a slot"


async def test_priority_goes_before_deadline_and_deadline_before_arrival(store: JobStore) -> None:
    first = await running(store, "first")
    await store.submit(new_job("batch", priority=Priority.BATCH, timeout_ms=60_000))
    await store.submit(new_job("late", timeout_ms=90_000))
    await store.submit(new_job("never-1"))
    await store.submit(new_job("never-2"))
    await store.submit(new_job("soon", timeout_ms=60_000))
    await store.submit(new_job("urgent", priority=Priority.URGENT))
    served, now = [], first
    for _ in range(6):
        await store.finish(now.job_id, now.epoch, FinishReason.EOS)
        (assigned,) = (await store.heartbeat_replica(hello())).assigned
        placement = await store.placement(assigned.job_id)
        assert placement is not None
        served.append(assigned.job_id)
        now = placement
    assert served == ["urgent", "soon", "late", "never-1", "never-2", "batch"]


async def test_how_many_jobs_wait_is_told_by_itself(store: JobStore) -> None:
    assert await store.queued() == 0
    await store.submit(new_job("a"))
    await store.submit(new_job("b"))
    assert await store.queued() == (await store.view()).queued == 2


async def test_lua_and_python_build_the_same_members(store: JobStore, redis: Redis, namespace: str) -> None:
    for number, priority in enumerate(Priority):
        await store.submit(new_job(f"a:{number}", priority=priority))
        await store.submit(new_job(f"b:{number}", priority=priority, timeout_ms=60_000 + number))
    stored = cast("list[bytes]", await redis.zrange(f"{Keys(namespace).base}:queue", 0, -1))
    members = [member.decode() for member in stored]
    assert len(members) == 2 * len(Priority)
    for member in members:
        entry = parse_member(member)
        record = await store.get(entry.job_id)
        expected = QueueEntry(record.priority, record.deadline_ms, entry.sequence, record.job_id)
        assert queue_member(expected) == member


async def test_only_waiting_jobs_count_against_the_limit(redis_server: RedisServer, namespace: str) -> None:
    store = JobStore(connect(redis_server.url), namespace=namespace, queue_limit=2, retry_after_ms=250)
    await running(store, "runs", slots=1)
    await store.submit(new_job("waits-1"))
    await store.submit(new_job("waits-2"))
    with pytest.raises(QueueFull) as caught:
        await store.submit(new_job("one-too-many"))
    assert caught.value.retry_after_ms == 250
    assert (await store.submit(new_job("waits-2")))[0] is False
    await store.cancel("runs")
    assert (await store.submit(new_job("fits-now")))[0] is True
    await store.close()


async def test_a_deadline_that_passes_in_the_queue_fails_the_job(store: JobStore) -> None:
    await running(store, "runs")
    await store.submit(new_job("urgent", priority=Priority.URGENT))
    await store.submit(new_job("hurried", timeout_ms=1))
    await asyncio.sleep(0.01)
    assert await store.assign() == 0
    record = await store.get("hurried")
    assert record.state is JobState.FAILED
    assert record.failure is not None
    assert (record.failure.code, record.failure.reason) == (4, "DEADLINE_EXCEEDED")
    assert record.failure.message == PASSED
    assert record.usage.run_ms == 0
    assert (await store.get("urgent")).state is JobState.QUEUED


async def test_a_freed_slot_skips_jobs_whose_deadline_has_passed(store: JobStore) -> None:
    first = await running(store, "first")
    for number in range(3):
        await store.submit(new_job(f"hurried-{number}", timeout_ms=200))
    await store.submit(new_job("patient"))
    # They pass while nothing looks at the queue: it is the freed slot that finds them.
    assert (await store.view()).queued == 4
    await asyncio.sleep(0.25)
    await store.finish("first", first.epoch, FinishReason.EOS)
    assert (await store.get("patient")).state is JobState.RUNNING
    assert (await store.get("hurried-2")).state is JobState.FAILED


async def test_a_new_replica_takes_waiting_jobs_with_its_first_heartbeat(store: JobStore) -> None:
    for number in range(3):
        assert await store.submit(new_job(f"job-{number}")) == (True, None)
    orders = await store.heartbeat_replica(hello(slots=2))
    assert {job.job_id for job in orders.assigned} == {"job-0", "job-1"}
    assert (await store.view()).queued == 1
