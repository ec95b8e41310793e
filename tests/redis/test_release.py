"""Jobs that go back to the queue, by release, by reap and with their replica, and what they take along."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.records import Checkpoint, JobAttempt
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import SAVED, commit, hello, new_job, on, requeued, rings, running

Lose = Callable[[JobStore, int, AttemptEnd, str], Awaitable[object]]
LOSSES = [end for end in AttemptEnd if end.is_loss]
OTHERS = [end for end in AttemptEnd if not end.is_loss]

# The ways in which a run ends before its job.
WAYS: dict[str, Lose] = {
    "release": lambda store, epoch, end, message: store.release("job", epoch, end, message),
    "reap": lambda store, epoch, end, message: store.reap("job", epoch, end, message),
    "leave": lambda store, epoch, end, message: store.leave_replica("replica-1", end, message),
}


async def lose(store: JobStore, end: AttemptEnd, message: str = "lost", way: str = "release") -> int:
    """The job `job` runs on replica-1 and ends so; returns the epoch of that run."""
    # However often it was lost, its heartbeat is believed at once here.
    if await store._redis.hexists(store._keys.replica("replica-1"), "suspect"):
        await store._redis.hset(store._keys.replica("replica-1"), "suspect", "1")
    await store.heartbeat_replica(hello())
    placement = await store.placement("job")
    assert placement is not None
    await WAYS[way](store, placement.epoch, end, message)
    return placement.epoch


async def test_a_released_job_goes_on_elsewhere_with_all_it_has(store: JobStore) -> None:
    first = await running(store)
    await commit(store, "job", first.epoch, 0)
    before = await store.get("job")
    await store.heartbeat_replica(hello("replica-2"))
    await store.drain_replica("replica-1")
    saved = replace(SAVED, canvas_index=1)
    await store.release("job", first.epoch, AttemptEnd.DRAINED, "scaled down", checkpoint=saved)

    second = await store.placement("job")
    assert second is not None
    assert (second.replica, second.epoch, second.committed_canvases) == ("replica-2", first.epoch + 1, 1)
    assert await store.checkpoint("job") == saved
    after = await store.get("job")
    assert (after.started_ms, after.seed, after.attempts) == (before.started_ms, before.seed, 2)
    (attempt,) = after.history
    assert attempt == JobAttempt(
        first.epoch, "replica-1", "DRAINED", "scaled down", attempt.started_ms, attempt.ended_ms
    )
    assert before.started_ms == attempt.started_ms <= attempt.ended_ms <= after.now_ms
    await commit(store, "job", second.epoch, 1)
    assert await store.canvases("job") == [b"canvas 0", b"canvas 1"]


async def test_the_slot_of_a_released_job_goes_to_the_head_of_the_queue(store: JobStore) -> None:
    first = await running(store, "first")
    await store.submit(new_job("second"))
    await store.release("first", first.epoch, AttemptEnd.ROUTER_LOST, "stream broke")
    # The released one arrived before: it is ahead again.
    assert await on(store, "first", "second") == ["replica-1", ""]


async def test_a_release_rings_the_owner(store: JobStore, redis: Redis, namespace: str) -> None:
    epoch = (await running(store)).epoch
    async with rings(redis, namespace) as heard:
        await store.release("job", epoch, AttemptEnd.ROUTER_LOST, "stream broke")
        assert await heard() == [f"router-1 released:{epoch} job", "router-1 assigned job"]


async def test_a_reap_rings_the_owner_and_the_replica(store: JobStore, redis: Redis, namespace: str) -> None:
    epoch = (await running(store)).epoch
    async with rings(redis, namespace) as heard:
        await store.reap("job", epoch, AttemptEnd.REPLICA_LOST, "killed")
        assert await heard() == [f"router-1 released:{epoch} job", f"replica-1 released:{epoch} job"]


async def test_a_replica_from_which_a_job_was_reaped_gets_nothing_until_its_next_heartbeat(store: JobStore) -> None:
    first = await running(store, "first", slots=4)
    await store.submit(new_job("second"))
    await store.reap("first", first.epoch, AttemptEnd.REPLICA_LOST, "stream broke")
    assert await on(store, "first", "second") == ["", "replica-1"]
    await store.submit(new_job("third"))
    assert await store.assign() == 0
    await store.heartbeat_replica(hello("replica-2", slots=1))
    assert await on(store, "first", "third") == ["replica-2", ""]
    await store.heartbeat_replica(hello(slots=4))
    assert await on(store, "third") == ["replica-1"]


async def test_a_replica_that_leaves_gives_back_what_it_runs(store: JobStore, redis: Redis, namespace: str) -> None:
    await store.heartbeat_replica(hello("replica-1", slots=2))
    for job_id in ("one", "two"):
        await store.submit(new_job(job_id))
    await store.heartbeat_replica(hello("replica-2", slots=1))
    assert await store.leave_replica("replica-1", AttemptEnd.ENGINE, "the engine died") == 2
    assert await on(store, "one", "two") == ["replica-2", ""]
    assert [row.replica for row in (await store.view()).replicas] == ["replica-2"]
    keys = Keys(namespace)
    assert await redis.exists(keys.replica("replica-1"), keys.running("replica-1")) == 0
    assert [attempt.reason for attempt in (await store.get("two")).history] == ["ENGINE"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", LOSSES)
async def test_a_job_that_was_lost_too_often_fails_with_its_history(store: JobStore, end: AttemptEnd, way: str) -> None:
    await running(store)
    for number in range(3):
        assert (await store.get("job")).losses == number
        await lose(store, end, f"loss {number}", way)
    record = await store.get("job")
    assert record.state is JobState.FAILED
    assert record.failure is not None
    assert (record.failure.code, record.failure.reason) == (10, "ATTEMPTS_EXHAUSTED")
    told = "; ".join(f"{end} on replica-1 (loss {number})" for number in range(3))
    assert record.failure.message == f"3 attempts in a row ended without a new canvas: {told}"
    assert [(attempt.epoch, attempt.reason) for attempt in record.history] == [(n, end) for n in (1, 2, 3)]
    await store.heartbeat_replica(hello())
    assert (await store.view()).replicas[0].active == 0


async def test_a_job_that_fails_for_its_losses_is_not_told_of_its_preemptions(store: JobStore) -> None:
    await running(store)
    for end in (AttemptEnd.ENGINE, AttemptEnd.PREEMPTED, AttemptEnd.STEP_HUNG, AttemptEnd.DRAINED):
        await lose(store, end, "gone")
    await lose(store, AttemptEnd.ENGINE, "broke")
    record = await store.get("job")
    assert record.failure is not None
    told = record.failure.message.partition(": ")[2]
    assert told == "ENGINE on replica-1 (gone); STEP_HUNG on replica-1 (gone); ENGINE on replica-1 (broke)"
    assert len(record.history) == 5


async def test_the_last_loss_rings_the_owner(store: JobStore, redis: Redis, namespace: str) -> None:
    await running(store)
    for _ in range(2):
        await lose(store, AttemptEnd.ENGINE)
    await store.heartbeat_replica(hello())
    async with rings(redis, namespace) as heard:
        await store.release("job", 3, AttemptEnd.ENGINE, "broke", checkpoint=SAVED, hand_over=True)
        assert await heard() == ["router-1 failed job"]
    assert await store.checkpoint("job") is None


@pytest.mark.parametrize("end", OTHERS)
async def test_an_end_that_is_not_the_fault_of_the_job_is_forgiven(store: JobStore, end: AttemptEnd) -> None:
    await running(store)
    for _ in range(5):
        await lose(store, end)
    record = await store.get("job")
    assert (record.state, record.losses, len(record.history)) == (JobState.RUNNING, 0, 5)


async def test_a_new_canvas_makes_up_for_the_losses_before_it(store: JobStore) -> None:
    await running(store)
    for index in range(4):
        await lose(store, AttemptEnd.REPLICA_LOST)
        epoch = await lose(store, AttemptEnd.REPLICA_LOST) + 1
        await store.heartbeat_replica(hello())
        await commit(store, "job", epoch, index)
        assert (await store.get("job")).losses == 0
    record = await store.get("job")
    assert (record.state, record.attempts, record.canvases) == (JobState.RUNNING, 9, 4)


async def test_a_repeated_commit_makes_up_for_nothing(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    await commit(store, "job", epoch, 0)
    await store.reap("job", epoch, AttemptEnd.REPLICA_LOST, "killed")
    await commit(store, "job", epoch, 0)
    assert (await store.get("job")).losses == 1


async def test_one_attempt_can_be_all_there_is(redis_server: RedisServer, namespace: str) -> None:
    store = JobStore(connect(redis_server.url), namespace=namespace, max_attempts=1)
    await running(store)
    await lose(store, AttemptEnd.DRAINED)
    await lose(store, AttemptEnd.ENGINE)
    assert (await store.get("job")).state is JobState.FAILED
    await store.close()


async def test_the_history_keeps_the_last_sixteen_runs(store: JobStore) -> None:
    await running(store)
    for _ in range(20):
        await lose(store, AttemptEnd.DRAINED)
    record = await store.get("job")
    assert [attempt.epoch for attempt in record.history] == list(range(5, 21))
    assert record.attempts == 21


async def test_a_job_that_comes_back_again_and_again_takes_no_more_memory(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await running(store)
    sizes = []
    for _ in range(3):
        for _ in range(20):
            await lose(store, AttemptEnd.DRAINED, "x" * 1000)
        sizes.append(await redis.memory_usage(Keys(namespace).job("job"), samples=0) or 0)
    assert sizes[2] <= 1.1 * sizes[0]
    assert sizes[2] < 16_384


@pytest.mark.parametrize(
    ("message", "kept"),
    [("x" * 501, "x" * 497 + "..."), ("\u00e9" * 500, "\u00e9" * 500), ('"\\\n\x00', '"\\\n\x00'), ("\udc80", "?")],
)
async def test_a_message_of_any_kind_is_kept_and_bounded(store: JobStore, message: str, kept: str) -> None:
    await running(store)
    for _ in range(3):
        await lose(store, AttemptEnd.ENGINE, message)
    record = await store.get("job")
    assert [attempt.message for attempt in record.history] == [kept] * 3
    assert record.failure is not None
    assert record.failure.message.count(kept) == 3


async def test_a_deadline_passes_in_the_queue_also_for_a_job_that_ran(store: JobStore) -> None:
    await store.heartbeat_replica(hello())
    _, placement = await store.submit(new_job(timeout_ms=100))
    assert placement is not None
    await store.drain_replica("replica-1")
    await store.release("job", placement.epoch, AttemptEnd.DRAINED, "drained", checkpoint=SAVED)
    assert (await store.get("job")).state is JobState.QUEUED
    await asyncio.sleep(0.12)
    await store.assign()
    record = await store.get("job")
    assert record.failure is not None
    assert (record.failure.reason, record.usage.attempts) == ("DEADLINE_EXCEEDED", 1)
    assert record.usage.run_ms >= 100
    assert await store.checkpoint("job") is None


async def test_a_checkpoint_is_kept_until_its_canvas_is_committed(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    assert await store.checkpoint("job") is None
    later = replace(SAVED, step=9, payload=b"more")
    for checkpoint in (SAVED, later):
        await store.save_checkpoint("job", epoch, checkpoint)
        assert await store.checkpoint("job") == checkpoint
    await commit(store, "job", epoch, 0)
    assert await store.checkpoint("job") is None


@pytest.mark.parametrize("index", [0, 2])
async def test_a_checkpoint_of_another_canvas_is_dropped(store: JobStore, index: int) -> None:
    epoch = (await running(store)).epoch
    await commit(store, "job", epoch, 0)
    kept, other = replace(SAVED, canvas_index=1), replace(SAVED, canvas_index=index)
    await store.save_checkpoint("job", epoch, other)
    assert await store.checkpoint("job") is None
    await store.save_checkpoint("job", epoch, kept)
    await store.release("job", epoch, AttemptEnd.DRAINED, "drained", checkpoint=other)
    assert await store.checkpoint("job") == kept


async def test_a_release_without_a_checkpoint_keeps_the_one_saved_before(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    await store.save_checkpoint("job", epoch, SAVED)
    await store.reap("job", epoch, AttemptEnd.REPLICA_LOST, "killed")
    assert await store.checkpoint("job") == SAVED


@pytest.mark.parametrize("ending", ["cancel", "finish"])
async def test_no_checkpoint_outlives_its_job(store: JobStore, ending: str) -> None:
    epoch = (await running(store)).epoch
    await store.save_checkpoint("job", epoch, Checkpoint("v1", 0, 1, b"x"))
    if ending == "cancel":
        await store.cancel("job")
    else:
        await store.finish("job", epoch, FinishReason.EOS)
    assert await store.checkpoint("job") is None


async def test_a_job_that_waits_again_can_be_cancelled(store: JobStore, redis: Redis, namespace: str) -> None:
    await requeued(store)
    assert (await store.cancel("job")).state is JobState.CANCELLED
    base = Keys(namespace).base
    names = ("queue", "waiting", "victims", "marked", "apart", "fresh:replica-1", "owned:router-1", "running:replica-1")
    assert await redis.exists(*(f"{base}:{name}" for name in names)) == 0
