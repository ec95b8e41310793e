"""Pages of jobs, and what retention leaves of them."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from cluster.errors import InvalidRequest
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.records import JobRecord
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import new_job, running


async def every_page(store: JobStore, page_size: int, state: JobState | None = None) -> list[list[JobRecord]]:
    pages, token = [], ""
    for _ in range(100):
        page = await store.list(page_size=page_size, page_token=token, state=state)
        pages.append(list(page.jobs))
        token = page.next_token
        if not token:
            break
    return pages


async def test_pages_hold_every_job_once_and_the_newest_first(store: JobStore) -> None:
    for number in range(7):
        await store.submit(new_job(f"job-{number}"))
    pages = await every_page(store, 3)
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [job.job_id for page in pages for job in page] == [f"job-{n}" for n in reversed(range(7))]
    assert all(job.spec == b"" and job.seed == 2**64 - 1 for page in pages for job in page)


async def test_a_full_last_page_has_no_next_token(store: JobStore) -> None:
    for number in range(4):
        await store.submit(new_job(f"job-{number}"))
    assert [len(page) for page in await every_page(store, 2)] == [2, 2]
    assert [len(page) for page in await every_page(store, 4)] == [4]


async def test_jobs_that_arrive_while_paging_shift_nothing(store: JobStore) -> None:
    for number in range(4):
        await store.submit(new_job(f"job-{number}"))
    first = await store.list(page_size=2)
    await store.submit(new_job("newcomer"))
    second = await store.list(page_size=2, page_token=first.next_token)
    assert [job.job_id for job in second.jobs] == ["job-1", "job-0"]


async def test_a_state_filter_finds_jobs_far_behind_others(store: JobStore) -> None:
    await running(store, "runs")
    for number in range(250):
        await store.submit(new_job(f"job-{number}"))
    pages = await every_page(store, 2, JobState.RUNNING)
    assert [[job.job_id for job in page] for page in pages] == [["runs"]]
    assert await every_page(store, 2, JobState.CANCELLED) == [[]]


@pytest.mark.parametrize(
    ("size", "token", "field"), [(0, "", "page_size"), (1001, "", "page_size"), (5, "?", "page_token")]
)
async def test_a_bad_page_is_refused_by_field(store: JobStore, size: int, token: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.list(page_size=size, page_token=token)
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_expired_jobs_leave_the_index(redis_server: RedisServer, redis: Redis, namespace: str) -> None:
    store = JobStore(connect(redis_server.url), namespace=namespace, retention_s=1)
    base = Keys(namespace).base
    for number in range(3):
        await store.submit(new_job(f"old-{number}"))
        await store.cancel(f"old-{number}")
    await asyncio.sleep(1.2)
    await store.submit(new_job("new"))
    await store.cancel("new")
    assert await redis.zrange(f"{base}:jobs", 0, -1) == [b"new"]
    assert await redis.zrange(f"{base}:expiring", 0, -1) == [b"new"]
    await redis.delete(Keys(namespace).job("new"))
    assert (await store.list(page_size=10)).jobs == ()
    assert await redis.exists(f"{base}:jobs") == 0
    await store.close()


async def test_a_list_shows_losses_and_leaves_out_history(store: JobStore) -> None:
    placement = await running(store)
    await store.reap("job", placement.epoch, AttemptEnd.REPLICA_LOST, "killed")
    (listed,) = (await store.list(page_size=1)).jobs
    assert (listed.losses, listed.history, listed.state) == (1, (), JobState.QUEUED)
    assert len((await store.get("job")).history) == 1
