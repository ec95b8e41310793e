"""Urgent jobs get slots from less urgent ones, which go on later with all they have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random
from typing import cast

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.records import AssignedJob
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from cluster.policy.preemption import Runner, choose_victims
from cluster.redis_server import RedisServer
from tests.redis.helpers import SAVED, commit, end_lease, hello, new_job, on, rings

BATCH, NORMAL, HIGH, URGENT = Priority


@pytest.fixture
async def frugal(redis_server: RedisServer, namespace: str) -> AsyncIterator[JobStore]:
    """A store in which a job gives way twice at most."""
    opened = JobStore(connect(redis_server.url), namespace=namespace, lease_ms=60_000, max_preemptions=2)
    yield opened
    await opened.close()


async def submit(store: JobStore, **jobs: Priority) -> None:
    for job_id, priority in jobs.items():
        await store.submit(new_job(job_id, priority=priority))


async def marked(store: JobStore, *replicas: str, slots: int = 1) -> list[str]:
    """The jobs that the replicas are told to stop."""
    orders = [await store.heartbeat_replica(hello(replica, slots=slots)) for replica in replicas or ("replica-1",)]
    return sorted(job.job_id for order in orders for job in order.assigned if job.preempt)


async def give_way(store: JobStore, job_id: str, epoch: int = 1) -> None:
    """What a replica does about a mark."""
    index = (await store.get(job_id)).canvases
    checkpoint = replace(SAVED, canvas_index=index)
    await store.release(job_id, epoch, AttemptEnd.PREEMPTED, "made room", checkpoint=checkpoint)


async def test_the_youngest_of_the_lowest_priority_is_told_to_stop(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello(slots=4))
    await submit(store, normal=NORMAL, old=BATCH, young=BATCH, high=HIGH)
    async with rings(redis, namespace) as heard:
        await submit(store, urgent=URGENT)
        assert await heard() == ["replica-1 preempt:1 young"]
    orders = await store.heartbeat_replica(hello(slots=4))
    assert AssignedJob("young", 1, preempt=True) in orders.assigned
    assert await marked(store, slots=4) == ["young"]
    assert await on(store, "urgent", "young") == ["", "replica-1"]


async def test_the_urgent_job_gets_the_slot_and_the_victim_goes_on_later_with_all_it_has(store: JobStore) -> None:
    await store.heartbeat_replica(hello())
    await submit(store, batch=BATCH)
    await commit(store, "batch", 1, 0)
    await submit(store, urgent=URGENT, normal=NORMAL)
    assert await marked(store) == ["batch"]
    await give_way(store, "batch")
    assert await on(store, "urgent", "normal", "batch") == ["replica-1", "", ""]
    assert await marked(store) == []

    await store.finish("urgent", 1, FinishReason.EOS)
    assert await on(store, "normal") == ["replica-1"]
    await store.finish("normal", 1, FinishReason.EOS)
    placement = await store.placement("batch")
    assert placement is not None
    assert (placement.epoch, placement.committed_canvases) == (2, 1)
    assert await store.checkpoint("batch") == replace(SAVED, canvas_index=1)
    record = await store.get("batch")
    assert (record.preemptions, record.losses, record.attempts) == (1, 0, 2)


@pytest.mark.parametrize("priority", Priority)
async def test_nobody_gives_way_to_an_equal(store: JobStore, priority: Priority) -> None:
    await store.heartbeat_replica(hello())
    await submit(store, runs=priority, waits=priority)
    assert await marked(store) == []


async def test_nobody_gives_way_while_a_slot_is_free(store: JobStore) -> None:
    await store.heartbeat_replica(hello(slots=2))
    await submit(store, batch=BATCH, urgent=URGENT)
    assert await marked(store, slots=2) == []


async def test_as_many_are_marked_as_slots_are_needed(store: JobStore) -> None:
    await store.heartbeat_replica(hello(slots=4))
    await submit(store, one=BATCH, two=BATCH, three=NORMAL, four=HIGH, u1=URGENT)
    assert await marked(store, slots=4) == ["two"]
    await submit(store, u2=URGENT, u3=URGENT)
    assert await marked(store, slots=4) == ["one", "three", "two"]
    for _ in range(3):
        await store.assign()
    assert await marked(store, slots=4) == ["one", "three", "two"]
    for victim in ("one", "two", "three"):
        await give_way(store, victim)
    assert await on(store, "u1", "u2", "u3", "four") == ["replica-1"] * 4
    assert await marked(store, slots=4) == []


async def test_a_job_gives_way_only_so_often(frugal: JobStore) -> None:
    await frugal.heartbeat_replica(hello())
    await submit(frugal, batch=BATCH)
    for number in (1, 2):
        await submit(frugal, **{f"urgent-{number}": URGENT})
        assert await marked(frugal) == ["batch"]
        await give_way(frugal, "batch", epoch=number)
        await frugal.finish(f"urgent-{number}", 1, FinishReason.EOS)
    await submit(frugal, urgent=URGENT)
    assert await marked(frugal) == []
    assert await on(frugal, "batch", "urgent") == ["replica-1", ""]
    await frugal.finish("batch", 3, FinishReason.EOS)
    assert await on(frugal, "urgent") == ["replica-1"]


async def test_a_victim_that_ends_first_has_given_its_slot(store: JobStore, redis: Redis, namespace: str) -> None:
    await store.heartbeat_replica(hello())
    await submit(store, batch=BATCH, urgent=URGENT)
    await store.finish("batch", 1, FinishReason.EOS)
    assert await on(store, "urgent") == ["replica-1"]
    base = Keys(namespace).base
    assert await redis.exists(f"{base}:marked") == 0
    assert await redis.zcard(f"{base}:victims") == 1


async def test_a_victim_that_is_lost_instead_counts_as_lost(store: JobStore) -> None:
    await store.heartbeat_replica(hello())
    await submit(store, batch=BATCH, urgent=URGENT)
    await store.reap("batch", 1, AttemptEnd.REPLICA_LOST, "killed")
    record = await store.get("batch")
    assert (record.preemptions, record.losses) == (0, 1)
    assert await marked(store) == []
    assert await on(store, "urgent") == ["replica-1"]


async def test_a_slot_that_nobody_can_use_is_not_asked_for(store: JobStore, redis: Redis, namespace: str) -> None:
    for replica in ("drains", "suspect", "silent", "fine"):
        await store.heartbeat_replica(hello(replica))
    # By name, in turn: drains, fine, silent, suspect; the last ones are the youngest.
    await submit(store, a=BATCH, b=NORMAL, c=BATCH, d=BATCH)
    assert await on(store, "a", "b", "c", "d") == ["drains", "fine", "silent", "suspect"]
    await store.drain_replica("drains")
    await redis.hset(Keys(namespace).replica("suspect"), "suspect", 1)
    await end_lease(redis, namespace, "replicas", "silent")
    await submit(store, urgent=URGENT)
    assert await redis.smembers(f"{Keys(namespace).base}:marked") == {b"b"}
    # It was not forgotten who may give way: the suspect is heard again.
    await submit(store, urgent_too=URGENT)
    assert await marked(store, "suspect") == ["d"]


async def test_a_victim_that_had_waited_long_does_not_take_its_slot_right_back(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello(slots=0))
    await submit(store, batch=BATCH)
    for _ in range(4):
        await redis.zadd(f"{Keys(namespace).base}:waiting", {"batch": 1})
        await store.assign()
    await store.heartbeat_replica(hello())
    await store.assign()
    await submit(store, urgent=URGENT)
    await give_way(store, "batch")
    assert await on(store, "urgent", "batch") == ["replica-1", ""]
    # Its place among its equals it keeps.
    await submit(store, later=BATCH)
    await store.finish("urgent", 1, FinishReason.EOS)
    assert await on(store, "batch", "later") == ["replica-1", ""]


async def test_an_urgent_job_that_lost_its_replica_gets_a_slot_elsewhere(store: JobStore) -> None:
    await store.heartbeat_replica(hello("replica-1"))
    await submit(store, batch=BATCH)
    await store.heartbeat_replica(hello("replica-2"))
    await submit(store, urgent=URGENT)
    await store.leave_replica("replica-2", AttemptEnd.ENGINE, "the engine died")
    assert await marked(store) == ["batch"]
    await give_way(store, "batch")
    assert await on(store, "urgent", "batch") == ["replica-1", ""]


@pytest.mark.parametrize("seed", range(25))
async def test_redis_marks_whom_the_policy_chooses(frugal: JobStore, redis: Redis, namespace: str, seed: int) -> None:
    random = Random(seed)
    slots = random.randint(1, 12)
    await frugal.heartbeat_replica(hello(slots=slots))
    runs = [f"runs-{number}" for number in range(slots)]
    for job_id in runs:
        await frugal.submit(new_job(job_id, priority=random.choice(list(Priority))))
        for epoch in range(1, 1 + random.choice([0, 0, 1, 2])):
            await give_way(frugal, job_id, epoch)
    # In the order in which they were assigned last.
    records = {job_id: await frugal.get(job_id) for job_id in runs}
    turns = {job_id: await turn(redis, namespace, job_id) for job_id in runs}
    running = [Runner(job, record.priority, turns[job], record.preemptions) for job, record in records.items()]
    waiting: list[Priority] = []
    expected: set[str] = set()
    for number in range(random.randint(1, 14)):
        waiting.append(random.choice(list(Priority)))
        await frugal.submit(new_job(f"waits-{number}", priority=waiting[-1]))
        left = [runner for runner in running if runner.job_id not in expected]
        queue = sorted(waiting, reverse=True)
        chosen = choose_victims(queue, left, marks=len(expected), max_preemptions=2)
        expected |= {runner.job_id for runner in chosen}
    assert set(await marked(frugal, slots=slots)) == expected
    assert {record.state for record in records.values()} == {JobState.RUNNING}


async def turn(redis: Redis, namespace: str, job_id: str) -> int:
    """Of the last assignment."""
    victim = cast("bytes | None", await redis.hget(Keys(namespace).job(job_id), "victim"))
    return 2**53 - 1 - int((victim or b"").split(b":")[1])
