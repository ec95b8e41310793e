"""Leases of replicas that end, drains, and what nobody may take for the end of a lease."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.errors import ReplicaNotFound, StaleEpoch
from cluster.jobs.keys import Keys
from cluster.jobs.records import AssignedJob
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import SAVED, commit, end_lease, hello, new_job, on, rings, running

NOT_HEARD = "the replica was not heard of for a whole lease"


async def test_jobs_of_a_replica_whose_lease_has_ended_go_on_elsewhere(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello("replica-1", slots=2))
    for job_id in ("one", "two"):
        await store.submit(new_job(job_id))
    await store.heartbeat_replica(hello("replica-2", slots=2))
    await end_lease(redis, namespace, "replicas", "replica-1")
    await store.look("router-1")
    assert await on(store, "one", "two") == ["replica-2", "replica-2"]
    (attempt,) = (await store.get("one")).history
    assert (attempt.reason, attempt.message, (await store.get("one")).losses) == ("LEASE_EXPIRED", NOT_HEARD, 1)
    assert [row.replica for row in (await store.view()).replicas] == ["replica-2"]


async def test_a_replica_that_comes_back_before_anybody_looked_keeps_its_jobs(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    epoch = (await running(store)).epoch
    await end_lease(redis, namespace, "replicas", "replica-1")
    assert (await store.heartbeat_replica(hello())).assigned == (AssignedJob("job", epoch),)
    await store.look("router-1")
    await store.finish("job", epoch, FinishReason.EOS)


async def test_a_replica_that_comes_back_after_its_lease_was_swept_runs_nothing(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    epoch = (await running(store)).epoch
    await store.heartbeat_replica(hello("replica-2"))
    await end_lease(redis, namespace, "replicas", "replica-1")
    await store.look("router-1")
    await store.submit(new_job("next"))
    assert (await store.heartbeat_replica(hello())).assigned == (AssignedJob("next", 1),)
    with pytest.raises(StaleEpoch):
        await commit(store, "job", epoch, 0)
    with pytest.raises(StaleEpoch):
        await store.release("job", epoch, AttemptEnd.LOST_WRITES, "back", checkpoint=SAVED)
    assert (await store.get("job")).replica == "replica-2"


async def test_a_replica_that_is_lost_again_and_again_is_believed_later_and_later(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    row = Keys(namespace).replica("replica-1")

    async def lose(job_id: str, *, after_canvas: bool = False) -> None:
        placement = await running(store, job_id)
        if after_canvas:
            await commit(store, job_id, placement.epoch, 0)
        await store.reap(job_id, placement.epoch, AttemptEnd.REPLICA_LOST, "connection refused")
        await store.cancel(job_id)

    async def is_believed() -> bool:
        await store.heartbeat_replica(hello())
        return not await redis.hexists(row, "suspect")

    await lose("first")
    assert await is_believed()
    await lose("second")
    assert not await is_believed()
    await redis.hset(row, "suspect", 1)  # its time is over
    assert await is_believed()
    # A canvas shows that it can be reached: it begins anew.
    await lose("third", after_canvas=True)
    assert await is_believed()


async def test_nobody_loses_anything_because_redis_was_away(store: JobStore, redis: Redis, namespace: str) -> None:
    keys = Keys(namespace)
    await store.heartbeat_router("router-1")
    epoch = (await running(store)).epoch
    await end_lease(redis, namespace, "replicas", "replica-1")
    await end_lease(redis, namespace, "routers", "router-1")
    # Nobody was heard for half a lease: it was not the processes that were away.
    await redis.hincrby(f"{keys.base}:pulse", "heard_ms", -31_000)
    for router in ("router-2", "router-3", "router-2"):
        await store.heartbeat_router(router)
        assert await store.look(router) == ()
    assert (await store.get("job")).state is JobState.RUNNING
    assert (await store.heartbeat_replica(hello())).assigned == (AssignedJob("job", epoch),)
    assert await store.heartbeat_router("router-1") == {"job"}


async def test_what_did_not_come_back_within_a_lease_after_an_outage_is_gone(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    keys = Keys(namespace)
    await running(store)
    await end_lease(redis, namespace, "replicas", "replica-1")
    await redis.hincrby(f"{keys.base}:pulse", "heard_ms", -31_000)
    await store.look("router-1")
    assert await on(store, "job") == ["replica-1"]
    grace_ms = int(await redis.hget(f"{keys.base}:pulse", "grace_ms") or 0)
    assert 59_000 < grace_ms - (await store.get("job")).now_ms <= 60_000
    await redis.hset(f"{keys.base}:pulse", "grace_ms", 1)
    await store.look("router-1")
    assert (await store.get("job")).state is JobState.QUEUED


async def test_leases_are_not_believed_before_a_namespace_is_one_lease_old(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await running(store)
    await redis.zadd(Keys(namespace).replicas, {"replica-1": 1})
    await store.look("router-1")
    assert await on(store, "job") == ["replica-1"]


async def test_a_sweep_moves_no_more_jobs_than_it_may_and_the_next_one_moves_the_rest(
    store: JobStore, redis: Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.jobs.processes._REAPED_PER_LOOK", 3)
    await store.heartbeat_replica(hello(slots=5))
    jobs = [f"job-{number}" for number in range(5)]
    for job_id in jobs:
        await store.submit(new_job(job_id))
    await end_lease(redis, namespace, "replicas", "replica-1")
    for left in (2, 0):
        await store.look("router-1")
        assert len([replica for replica in await on(store, *jobs) if replica]) == left
    assert (await store.view()).replicas == ()


async def test_a_draining_replica_gets_nothing_also_after_heartbeats(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello(slots=4))
    await store.submit(new_job("runs"))
    async with rings(redis, namespace) as heard:
        assert await store.drain_replica("replica-1") == 1
        assert await heard() == ["replica-1 drain -"]
    await store.submit(new_job("waits"))
    orders = await store.heartbeat_replica(hello(slots=4))
    assert orders.draining
    assert [job.job_id for job in orders.assigned] == ["runs"]
    assert await store.assign() == 0
    (row,) = (await store.view()).replicas
    assert (row.draining, row.active) == (True, 1)
    await store.heartbeat_replica(hello("replica-2", slots=4))
    assert await on(store, "runs", "waits") == ["replica-1", "replica-2"]
    await commit(store, "runs", 1, 0)


async def test_a_replica_of_the_same_name_that_comes_after_a_drain_takes_jobs(store: JobStore) -> None:
    await store.heartbeat_replica(hello())
    await store.drain_replica("replica-1")
    await store.leave_replica("replica-1", AttemptEnd.DRAINED, "drained")
    assert not (await store.heartbeat_replica(hello())).draining
    _, placement = await store.submit(new_job())
    assert placement is not None


async def test_a_replica_that_nobody_knows_cannot_be_drained(store: JobStore) -> None:
    await running(store)
    with pytest.raises(ReplicaNotFound, match="no replica nobody"):
        await store.drain_replica("nobody")
    assert [row.replica for row in (await store.view()).replicas] == ["replica-1"]


async def test_a_replica_with_more_slots_than_jobs_are_placed_at_once_fills_up_with_its_first_heartbeat(
    store: JobStore,
) -> None:
    for number in range(140):
        await store.submit(new_job(f"job-{number}"))
    assert len((await store.heartbeat_replica(hello(slots=256))).assigned) == 140
