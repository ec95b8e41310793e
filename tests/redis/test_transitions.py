"""Every (state, action) pair, in Redis as in the table; and writers whose epoch is old."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cluster.core import FinishReason
from cluster.errors import JobNotFound, RequestIdReused, StaleEpoch, TransitionError
from cluster.jobs.records import JobFailure
from cluster.jobs.states import TRANSITIONS, Action, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import BROKEN, bring_to, hello, new_job, running

Act = Callable[[JobStore, int], Awaitable[object]]

OTHER_FAILURE = JobFailure(code=4, reason="DEADLINE_EXCEEDED", message="too late")


async def assign(store: JobStore, epoch: int) -> None:
    await store.heartbeat_replica(hello(slots=1))
    await store.assign()


# Release and reap have their place in the table; their scripts do not exist yet.
ACTS: dict[Action, Act] = {
    Action.submit: lambda store, epoch: store.submit(new_job()),
    Action.assign: assign,
    Action.commit: lambda store, epoch: store.commit("job", epoch, 0, b"c", tokens=1, denoising_steps=1),
    Action.finish: lambda store, epoch: store.finish("job", epoch, FinishReason.EOS),
    Action.fail: lambda store, epoch: store.fail("job", OTHER_FAILURE),
    Action.cancel: lambda store, epoch: store.cancel("job"),
}
# These find nothing to do where they do not apply; the others are refused.
LENIENT = {Action.submit, Action.assign, Action.cancel}


@pytest.mark.parametrize("action", ACTS)
@pytest.mark.parametrize("state", JobState)
async def test_redis_makes_the_moves_of_the_table_and_no_other(
    store: JobStore, state: JobState, action: Action
) -> None:
    epoch = await bring_to(store, state)
    before = await store.get("job")
    assert before.state is state
    expected = TRANSITIONS.get((state, action))
    if expected is None and action not in LENIENT:
        with pytest.raises(TransitionError, match=f"job job: {action}.*the job is {state}"):
            await ACTS[action](store, epoch)
    else:
        await ACTS[action](store, epoch)
    assert (await store.get("job")).state is (expected or state)


@pytest.mark.parametrize("action", [Action.commit, Action.finish, Action.fail, Action.cancel])
async def test_a_job_that_does_not_exist_makes_no_move_but_submit(store: JobStore, action: Action) -> None:
    with pytest.raises(JobNotFound, match="no job job"):
        await ACTS[action](store, 1)
    with pytest.raises(JobNotFound):
        await store.get("job")
    with pytest.raises(JobNotFound):
        await store.placement("job")


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.QUEUED])
async def test_a_writer_with_another_epoch_is_stale_in_every_state(store: JobStore, state: JobState) -> None:
    epoch = await bring_to(store, state)
    before = await store.get("job")
    for other in (epoch - 1, epoch + 1):
        with pytest.raises(StaleEpoch, match=f"{state} under epoch {epoch}"):
            await store.commit("job", other, 0, b"c", tokens=1, denoising_steps=1)
        with pytest.raises(StaleEpoch):
            await store.finish("job", other, FinishReason.EOS)
        with pytest.raises(StaleEpoch):
            await store.fail("job", BROKEN, epoch=other)
    after = await store.get("job")
    assert (after.state, after.canvases) == (before.state, before.canvases)


async def test_a_replica_cannot_fail_a_job_that_waits(store: JobStore) -> None:
    await bring_to(store, JobState.QUEUED)
    with pytest.raises(TransitionError):
        await store.fail("job", BROKEN, epoch=0)


@pytest.mark.parametrize("state", JobState)
async def test_the_same_request_twice_is_one_job(store: JobStore, state: JobState) -> None:
    await bring_to(store, state)
    before = await store.get("job")
    created, placement = await store.submit(new_job())
    assert not created
    assert (placement is not None) == (state is JobState.RUNNING)
    after = await store.get("job")
    assert (after.state, after.epoch, after.created_ms) == (before.state, before.epoch, before.created_ms)
    assert (await store.view()).queued == (1 if state is JobState.QUEUED else 0)


async def test_a_request_id_with_another_body_is_refused(store: JobStore) -> None:
    await store.submit(new_job())
    with pytest.raises(RequestIdReused, match="job"):
        await store.submit(new_job(digest="another"))


async def test_an_ending_repeated_word_for_word_is_answered_like_the_first(store: JobStore) -> None:
    epoch = (await running(store, "done")).epoch
    await store.finish("done", epoch, FinishReason.EOS)
    first = await store.get("done")
    await store.finish("done", epoch, FinishReason.EOS)
    assert (await store.get("done")).finished_ms == first.finished_ms

    epoch = (await running(store, "broken")).epoch
    await store.fail("broken", BROKEN, epoch=epoch)
    await store.fail("broken", BROKEN, epoch=epoch)
    assert (await store.get("broken")).failure == BROKEN


async def test_a_record_says_everything_that_was_submitted(store: JobStore) -> None:
    await store.submit(new_job(timeout_ms=5000))
    record = await store.get("job")
    assert (record.spec, record.seed, record.tenant) == (b"\x00spec\xff", 2**64 - 1, "tenant")
    assert record.deadline_ms == record.created_ms + 5000
    assert (record.prompt_tokens, record.router, record.replica) == (7, "router-1", "")
    assert record.usage.queue_ms == record.now_ms - record.created_ms
    assert record.usage.run_ms == 0
