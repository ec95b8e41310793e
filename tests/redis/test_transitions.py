"""Every (state, action) pair, in Redis as in the table; and writers whose epoch is old."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from cluster.core import FinishReason
from cluster.errors import JobNotFound, RequestIdReused, StaleEpoch, TransitionError
from cluster.jobs.records import JobFailure
from cluster.jobs.states import TRANSITIONS, Action, AttemptEnd, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import BROKEN, SAVED, bring_to, hello, new_job, requeued, running

Act = Callable[[JobStore, int], Awaitable[object]]

OTHER_FAILURE = JobFailure(code=4, reason="DEADLINE_EXCEEDED", message="too late")


async def assign(store: JobStore, epoch: int) -> None:
    await store.heartbeat_replica(hello(slots=1))
    await store.assign()


async def release(store: JobStore, epoch: int) -> None:
    # Else the slot that it frees would be its own at once.
    await store.heartbeat_replica(hello(slots=0))
    await store.release("job", epoch, AttemptEnd.DRAINED, "drained")


ACTS: dict[Action, Act] = {
    Action.submit: lambda store, epoch: store.submit(new_job()),
    Action.assign: assign,
    Action.commit: lambda store, epoch: store.commit("job", epoch, 0, b"c", tokens=1, denoising_steps=1),
    Action.checkpoint: lambda store, epoch: store.save_checkpoint("job", epoch, SAVED),
    Action.finish: lambda store, epoch: store.finish("job", epoch, FinishReason.EOS),
    Action.fail: lambda store, epoch: store.fail("job", OTHER_FAILURE),
    Action.cancel: lambda store, epoch: store.cancel("job"),
    Action.release: release,
    Action.reap: lambda store, epoch: store.reap("job", epoch, AttemptEnd.REPLICA_LOST, "killed"),
}
# These find nothing to do where they do not apply; the others are refused.
LENIENT = {Action.submit, Action.assign, Action.cancel}
# These say under which epoch they write.
FENCED: dict[str, Act] = {
    **{str(a): ACTS[a] for a in (Action.commit, Action.checkpoint, Action.finish, Action.release, Action.reap)},
    "last commit": lambda store, epoch: store.commit(
        "job", epoch, 0, b"z", tokens=1, denoising_steps=1, finish=FinishReason.EOS
    ),
    "fail by the replica": lambda store, epoch: store.fail("job", BROKEN, epoch=epoch),
    "release with a checkpoint": lambda store, epoch: store.release(
        "job", epoch, AttemptEnd.ROUTER_LOST, "left", checkpoint=SAVED, hand_over=True
    ),
}


def test_every_action_of_the_table_is_tried() -> None:
    assert set(ACTS) == set(Action)


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
        with pytest.raises(TransitionError, match=f"job job: {action}.*the job is {state}") as caught:
            await ACTS[action](store, epoch)
        assert not isinstance(caught.value, StaleEpoch)
    else:
        await ACTS[action](store, epoch)
    assert (await store.get("job")).state is (expected or state)


@pytest.mark.parametrize("action", [action for action in Action if action not in (Action.submit, Action.assign)])
async def test_a_job_that_does_not_exist_makes_no_move_but_submit(store: JobStore, action: Action) -> None:
    with pytest.raises(JobNotFound, match="no job job"):
        await ACTS[action](store, 1)
    with pytest.raises(JobNotFound):
        await store.get("job")
    with pytest.raises(JobNotFound):
        await store.placement("job")


@pytest.mark.parametrize("write", FENCED)
@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.QUEUED])
async def test_a_writer_with_another_epoch_is_stale_in_every_state(
    store: JobStore, state: JobState, write: str
) -> None:
    epoch = await bring_to(store, state)
    before = await store.get("job")
    for other in (epoch - 1, epoch + 1):
        with pytest.raises(StaleEpoch, match=f"{state} under epoch {epoch}"):
            await FENCED[write](store, other)
    after = await store.get("job")
    assert replace(after, now_ms=0) == replace(before, now_ms=0)
    assert await store.checkpoint("job") is None
    assert await store.canvases("job") == []


@pytest.mark.parametrize("write", FENCED)
async def test_who_ran_a_job_that_waits_again_writes_nothing_more(store: JobStore, write: str) -> None:
    epoch = await requeued(store)
    before = await store.get("job")
    assert (before.state, before.epoch) == (JobState.QUEUED, epoch)
    with pytest.raises(TransitionError, match="the job is queued") as caught:
        await FENCED[write](store, epoch)
    assert not isinstance(caught.value, StaleEpoch)
    assert replace(await store.get("job"), now_ms=0) == replace(before, now_ms=0)


@pytest.mark.parametrize("write", FENCED)
async def test_who_ran_a_job_that_runs_elsewhere_is_stale(store: JobStore, write: str) -> None:
    epoch = await requeued(store)
    await store.heartbeat_replica(hello("replica-2"))
    before = await store.get("job")
    assert (before.state, before.epoch, before.replica) == (JobState.RUNNING, epoch + 1, "replica-2")
    with pytest.raises(StaleEpoch, match=f"running under epoch {epoch + 1}"):
        await FENCED[write](store, epoch)
    assert replace(await store.get("job"), now_ms=0) == replace(before, now_ms=0)
    assert await store.checkpoint("job") is None


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
