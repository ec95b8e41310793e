"""Who gets which slot."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.records import AssignedJob, ReplicaOrders
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import BROKEN, hello, new_job, running


async def submit_many(store: JobStore, *job_ids: str) -> list[str]:
    """Submits in order; returns the replica of each, or ""."""
    placements = [(await store.submit(new_job(job_id)))[1] for job_id in job_ids]
    return [placement.replica if placement else "" for placement in placements]


async def test_two_stores_racing_for_the_last_slot_give_it_once(redis_server: RedisServer, namespace: str) -> None:
    stores = [JobStore(connect(redis_server.url), namespace=namespace) for _ in range(2)]
    await stores[0].heartbeat_replica(hello(slots=1))
    jobs = [f"job-{number}" for number in range(40)]
    racing = [stores[i % 2].submit(new_job(job_id)) for i, job_id in enumerate(jobs)]
    await asyncio.gather(*racing, *(store.assign() for store in stores for _ in range(10)))
    states = Counter([(await stores[0].get(job_id)).state for job_id in jobs])
    assert states == {JobState.RUNNING: 1, JobState.QUEUED: 39}
    assert (await stores[1].view()).replicas[0].active == 1
    for store in stores:
        await store.close()


async def test_the_replica_with_the_fewest_active_canvases_is_chosen(store: JobStore) -> None:
    await store.heartbeat_replica(hello("a", slots=8))
    assert await submit_many(store, "1", "2") == ["a", "a"]
    await store.heartbeat_replica(hello("b", slots=8))
    assert await submit_many(store, "3", "4") == ["b", "b"]


async def test_a_tie_goes_to_the_replica_that_is_idle_longest(store: JobStore) -> None:
    for replica in "abc":
        await store.heartbeat_replica(hello(replica, slots=2))
    assert await submit_many(store, "1") == ["a"]
    await store.finish("1", 1, FinishReason.EOS)
    # All are empty; "a" comes first by name but has just had a job.
    assert await submit_many(store, "2") == ["b"]
    await store.finish("2", 1, FinishReason.EOS)
    assert await submit_many(store, "3", "4", "5") == ["c", "a", "b"]


async def test_a_full_replica_is_passed_over(store: JobStore) -> None:
    await store.heartbeat_replica(hello("big", slots=3))
    assert await submit_many(store, "1", "2") == ["big", "big"]
    await store.heartbeat_replica(hello("small", slots=1))
    assert await submit_many(store, "3", "4", "5") == ["small", "big", ""]


async def test_a_replica_whose_lease_has_ended_gets_nothing(
    store: JobStore, redis_server: RedisServer, namespace: str
) -> None:
    brief = JobStore(connect(redis_server.url), namespace=namespace, lease_ms=1)
    await brief.heartbeat_replica(hello("gone", slots=8))
    await asyncio.sleep(0.01)
    assert await submit_many(store, "1") == [""]
    (row,) = (await store.view()).replicas
    assert (row.replica, row.lease_ms, row.stats) == ("gone", 0, {"steps": 1.5})
    await store.heartbeat_replica(hello("gone", slots=8))
    assert (await store.get("1")).replica == "gone"
    await brief.close()


async def test_a_replica_that_left_gets_nothing(store: JobStore) -> None:
    await store.heartbeat_replica(hello(slots=2))
    assert await store.leave_replica("replica-1", AttemptEnd.DRAINED, "scaled down") == 0
    assert (await store.view()).replicas == ()
    assert await submit_many(store, "job") == [""]


async def test_a_finished_job_hands_its_slot_to_the_head_of_the_queue(store: JobStore) -> None:
    first = await running(store, "first")
    await store.submit(new_job("second"))
    assert await store.placement("second") is None
    await store.finish("first", first.epoch, FinishReason.EOS)
    second = await store.placement("second")
    assert second is not None
    assert (second.replica, second.address, second.epoch) == ("replica-1", "replica-1:1", 1)
    assert second.committed_canvases == 0


@pytest.mark.parametrize("by_owner", [True, False])
async def test_a_failed_job_hands_its_slot_to_the_head_of_the_queue(store: JobStore, by_owner: bool) -> None:
    first = await running(store, "first")
    await store.submit(new_job("second"))
    await store.fail("first", BROKEN, epoch=None if by_owner else first.epoch)
    assert (await store.get("second")).state is JobState.RUNNING


async def test_cancelling_in_the_queue_and_while_running_frees_the_place(store: JobStore) -> None:
    await running(store, "runs")
    for job_id in ("waits-1", "waits-2"):
        await store.submit(new_job(job_id))
    assert (await store.cancel("waits-1")).state is JobState.CANCELLED
    assert (await store.view()).queued == 1
    cancelled = await store.cancel("runs")
    assert (cancelled.state, cancelled.attempts) == (JobState.CANCELLED, 1)
    assert (await store.get("waits-2")).state is JobState.RUNNING
    again = await store.cancel("runs")
    assert (again.state, again.finished_ms) == (JobState.CANCELLED, cancelled.finished_ms)


async def test_a_heartbeat_returns_what_redis_says_the_replica_runs(store: JobStore) -> None:
    await running(store, "kept", slots=4)
    await store.submit(new_job("cancelled"))
    await store.cancel("cancelled")
    orders = await store.heartbeat_replica(hello(slots=4))
    assert orders == ReplicaOrders((AssignedJob("kept", 1),), draining=False)


async def test_the_view_shows_live_routers_and_the_queue(
    store: JobStore, redis_server: RedisServer, namespace: str
) -> None:
    brief = JobStore(connect(redis_server.url), namespace=namespace, lease_ms=1)
    await brief.heartbeat_router("gone")
    await store.heartbeat_router("here")
    await store.submit(new_job(router="here"))
    await asyncio.sleep(0.01)
    view = await store.view()
    assert (view.routers, view.queued) == (("here",), 1)
    await store.leave_router("here")
    assert (await store.view()).routers == ()
    await brief.close()


async def test_ended_jobs_leave_nothing_but_a_record_that_expires(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    keys = Keys(namespace)
    placement = await running(store)
    await store.commit("job", placement.epoch, 0, b"c", tokens=1, denoising_steps=1, finish=FinishReason.EOS)
    assert 3500 < await redis.ttl(keys.job("job")) <= 3600
    assert 3500 < await redis.ttl(keys.canvases("job")) <= 3600
    assert await redis.exists(keys.running("replica-1"), f"{keys.base}:queue") == 0
