"""Quotas of tenants, decided in the scripts: what is refused, what is held, and that nobody else pays for it."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.errors import QuotaExceeded
from cluster.jobs.keys import Keys
from cluster.jobs.quotas import quota_rows
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from cluster.security.settings import QuotaSettings, QuotasSettings
from tests.redis.helpers import BROKEN, hello, new_job, on

ONE_AT_ONCE = {"acme": "1 - - -"}


async def test_a_thousand_jobs_beyond_a_quota_stand_in_nobodys_way(store: JobStore) -> None:
    await store.set_quotas(ONE_AT_ONCE)
    for number in range(999):
        await store.submit(new_job(f"acme-{number}", tenant="acme", priority=Priority.URGENT))
    await store.submit(new_job("globex", tenant="globex", priority=Priority.BATCH))
    assert (await store.view()).queued == 1000
    await store.heartbeat_replica(hello(slots=3))
    assert await on(store, "acme-0", "acme-1", "globex") == ["replica-1", "", "replica-1"]
    # A freed slot goes to what may have it in the script that frees it.
    placement = await store.placement("acme-0")
    assert placement is not None
    await store.finish("acme-0", placement.epoch, FinishReason.LENGTH)
    assert await on(store, "acme-1", "acme-2") == ["replica-1", ""]


async def test_a_tenants_better_job_goes_before_its_others_also_when_they_are_let_in(store: JobStore) -> None:
    await store.set_quotas(ONE_AT_ONCE)
    await store.submit(new_job("batch", tenant="acme", priority=Priority.BATCH))
    await store.submit(new_job("urgent", tenant="acme", priority=Priority.URGENT))
    await store.submit(new_job("normal", tenant="acme"))
    await store.heartbeat_replica(hello(slots=2))
    assert await on(store, "urgent", "normal", "batch") == ["replica-1", "", ""]
    await store.cancel("urgent")
    assert await on(store, "normal", "batch") == ["replica-1", ""]


async def test_a_job_beyond_its_tenants_quota_takes_nobodys_slot(store: JobStore) -> None:
    await store.set_quotas(ONE_AT_ONCE)
    await store.heartbeat_replica(hello(slots=2))
    await store.submit(new_job("first", tenant="acme", priority=Priority.BATCH))
    await store.submit(new_job("other", tenant="globex", priority=Priority.BATCH))
    await store.submit(new_job("urgent", tenant="acme", priority=Priority.URGENT))
    orders = await store.heartbeat_replica(hello(slots=2))
    assert not [job for job in orders.assigned if job.preempt]


async def test_a_held_job_misses_its_deadline_like_any_other(store: JobStore, redis: Redis, namespace: str) -> None:
    await store.set_quotas(ONE_AT_ONCE)
    await store.submit(new_job("first", tenant="acme"))
    await store.submit(new_job("late", tenant="acme", timeout_ms=60_000))
    base = Keys(namespace).base
    # "late" goes before "first" by its deadline; the other one is held, and its deadline is made to pass.
    assert await redis.zrange(f"{base}:held", 0, -1) == [b"first"]
    await redis.zadd(f"{base}:held", {"first": 1})
    await store.assign()
    assert (await store.get("first")).state is JobState.FAILED
    assert (await store.get("late")).state is JobState.QUEUED


async def test_limits_that_are_lifted_let_everything_in(store: JobStore) -> None:
    await store.set_quotas({"": "1 - - -"})
    await store.heartbeat_replica(hello(slots=4))
    for number in range(4):
        await store.submit(new_job(f"job-{number}"))
    assert await on(store, "job-0", "job-1") == ["replica-1", ""]
    await store.set_quotas({})
    assert await on(store, "job-1", "job-2", "job-3") == ["replica-1"] * 3


async def test_tokens_come_back_with_time_and_a_repeat_spends_none(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.set_quotas({"": "- - 2 3"})
    for number in (0, 1, 2, 0, 1, 2):
        await store.submit(new_job(f"job-{number}"))
    with pytest.raises(QuotaExceeded, match="2 requests a second") as refused:
        await store.submit(new_job("job-3"))
    assert 0 < (refused.value.retry_after_ms or 0) <= 500
    # As if half a second had gone by: one token, and no more.
    bucket = f"{Keys(namespace).base}:bucket:tenant"
    at_ms = int((await redis.hget(bucket, "at_ms")) or 0)
    await redis.hset(bucket, mapping={"tokens": "0", "at_ms": at_ms - 500})
    await store.submit(new_job("job-3"))
    with pytest.raises(QuotaExceeded):
        await store.submit(new_job("job-4", digest="another"))
    assert 0 < await redis.pttl(bucket) <= 2500


async def test_a_queued_limit_counts_what_waits_and_nothing_that_runs_or_has_ended(store: JobStore) -> None:
    await store.set_quotas({"tenant": "- 1 - -"})
    await store.heartbeat_replica(hello(slots=1))
    await store.submit(new_job("runs"))
    await store.submit(new_job("waits"))
    with pytest.raises(QuotaExceeded, match="1 jobs waiting"):
        await store.submit(new_job("beyond"))
    await store.submit(new_job("free", tenant="another"))
    await store.fail("waits", BROKEN)
    await store.submit(new_job("beyond"))


def test_rows_say_what_the_settings_say() -> None:
    assert quota_rows(QuotasSettings()) == {}
    default = QuotaSettings(running_canvases=4, requests_per_s=0.5)
    rows = quota_rows(QuotasSettings(default=default, tenants={"acme": QuotaSettings(queued_jobs=7, burst=9)}))
    assert rows == {"": "4 - 0.5 1", "acme": "4 7 0.5 9"}
    assert quota_rows(QuotasSettings(tenants={"acme": QuotaSettings(streams=3)})) == {}
