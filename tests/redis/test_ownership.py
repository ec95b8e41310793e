"""Which router has charge of a job, and how another one gets it."""

from __future__ import annotations

from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.jobs.keys import Keys
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import SAVED, end_lease, hello, new_job, rings, running


async def three_jobs(store: JobStore) -> None:
    """Of router-1: one that runs, one that waits, one that has ended."""
    await store.heartbeat_router("router-1")
    await running(store, "ended")
    await store.finish("ended", 1, FinishReason.EOS)
    await store.submit(new_job("runs"))
    await store.submit(new_job("waits"))


async def test_the_jobs_of_a_router_whose_lease_has_ended_are_adopted(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await three_jobs(store)
    await store.heartbeat_router("router-2")
    assert await store.look("router-2") == ()
    await end_lease(redis, namespace, "routers", "router-1")
    assert set(await store.look("router-2")) == {"runs", "waits"}
    assert await store.look("router-2") == await store.look("router-3") == ()
    assert await store.heartbeat_router("router-2") == {"runs", "waits"}
    assert await store.heartbeat_router("router-1") == set()
    placement = await store.placement("runs")
    assert placement is not None
    assert (placement.router, placement.epoch, placement.replica) == ("router-2", 1, "replica-1")
    assert (await store.get("ended")).router == "router-1"


async def test_an_adopted_job_rings_its_new_router(store: JobStore, redis: Redis, namespace: str) -> None:
    await three_jobs(store)
    await end_lease(redis, namespace, "routers", "router-1")
    await store.look("router-2")
    async with rings(redis, namespace) as heard:
        await store.finish("runs", 1, FinishReason.EOS)
        assert await heard() == ["router-2 assigned waits"]


async def test_a_router_that_leaves_tells_the_others_who_adopt_its_jobs_at_once(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await three_jobs(store)
    await store.heartbeat_router("router-2")
    async with rings(redis, namespace) as heard:
        await store.leave_router("router-1")
        assert await heard() == ["router-2 look -"]
    assert (await store.view()).routers == ("router-2",)
    # The namespace is younger than a lease: who gave its lease back is believed all the same.
    assert set(await store.look("router-2")) == {"runs", "waits"}
    assert await redis.zrange(Keys(namespace).routers, 0, -1) == [b"router-2"]


async def test_the_last_router_that_leaves_keeps_its_jobs_for_the_next_one(store: JobStore) -> None:
    await three_jobs(store)
    await store.leave_router("router-1")
    assert (await store.view()).routers == ()
    assert set(await store.look("router-9")) == {"runs", "waits"}


async def test_a_router_that_leaves_without_jobs_leaves_nothing(store: JobStore, redis: Redis, namespace: str) -> None:
    await store.heartbeat_router("router-1")
    await store.leave_router("router-1")
    assert await redis.exists(Keys(namespace).routers) == 0


async def test_jobs_of_a_router_that_was_never_heard_are_adopted_too(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_router("router-2")
    await store.submit(new_job(router="stillborn"))
    assert await store.look("router-2") == ()
    await end_lease(redis, namespace, "routers", "stillborn")
    assert await store.look("router-2") == ("job",)


async def test_jobs_that_a_leaving_router_still_took_are_adopted_too(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_router("router-1")
    await store.leave_router("router-1")
    await store.submit(new_job())
    await end_lease(redis, namespace, "routers", "router-1")
    assert await store.look("router-2") == ("job",)


async def test_a_job_that_its_replica_hands_over_goes_to_another_live_router(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    for router in ("router-1", "router-2", "gone"):
        await store.heartbeat_router(router)
    await end_lease(redis, namespace, "routers", "gone")
    epoch = (await running(store)).epoch
    async with rings(redis, namespace) as heard:
        lost = AttemptEnd.ROUTER_LOST
        await store.release("job", epoch, lost, "stream broke", checkpoint=SAVED, hand_over=True)
        heir_rings = ["router-2 adopted job", "router-2 assigned job"]
        assert await heard() == [f"router-1 released:{epoch} job", *heir_rings]
    placement = await store.placement("job")
    assert placement is not None
    assert (placement.router, placement.epoch) == ("router-2", epoch + 1)
    assert await store.heartbeat_router("router-1") == set()
    assert await store.heartbeat_router("router-2") == {"job"}
    assert await store.checkpoint("job") == SAVED


async def test_handed_over_jobs_are_shared_out(store: JobStore) -> None:
    routers = ["router-1", "router-2", "router-3"]
    for router in routers:
        await store.heartbeat_router(router)
    await store.heartbeat_replica(hello(slots=30))
    for number in range(30):
        await store.submit(new_job(f"job-{number}"))
        await store.release(f"job-{number}", 1, AttemptEnd.ROUTER_LOST, "stream broke", hand_over=True)
    owned = [len(await store.heartbeat_router(router)) for router in routers]
    assert owned == [0, 15, 15]


async def test_a_job_without_another_live_router_stays_with_its_own(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    await store.heartbeat_router("router-1")
    await store.release("job", epoch, AttemptEnd.ROUTER_LOST, "stream broke", hand_over=True)
    record = await store.get("job")
    assert (record.router, record.state, record.epoch) == ("router-1", JobState.RUNNING, epoch + 1)


async def test_a_job_that_waits_with_a_lost_router_can_be_submitted_again_and_is_the_same(store: JobStore) -> None:
    await store.submit(new_job(router="router-1"))
    assert await store.submit(new_job(router="router-2")) == (False, None)
    assert (await store.get("job")).router == "router-1"
