"""Canvases are appended once, in order, under one epoch."""

from __future__ import annotations

import pytest

from cluster.core import FinishReason
from cluster.errors import StaleEpoch, TransitionError
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import new_job, running


async def test_canvases_are_read_back_in_order_and_from_an_offset(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    for index in range(3):
        await store.commit("job", epoch, index, b"\x00canvas%d" % index, tokens=10, denoising_steps=5)
    assert await store.canvases("job") == [b"\x00canvas0", b"\x00canvas1", b"\x00canvas2"]
    assert await store.canvases("job", 2) == [b"\x00canvas2"]
    assert await store.canvases("job", 3) == []
    record = await store.get("job")
    assert (record.canvases, record.generated_tokens, record.denoising_steps) == (3, 30, 15)
    placement = await store.placement("job")
    assert placement is not None
    assert placement.committed_canvases == 3


async def test_a_repeated_commit_is_answered_and_counted_once(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    for _ in range(2):
        await store.commit("job", epoch, 0, b"c", tokens=10, denoising_steps=5)
    assert await store.canvases("job") == [b"c"]
    assert (await store.get("job")).generated_tokens == 10


async def test_other_bytes_under_a_taken_index_are_refused(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    await store.commit("job", epoch, 0, b"c", tokens=10, denoising_steps=5)
    for finish in (None, FinishReason.EOS):
        with pytest.raises(TransitionError, match=r"canvas 0 under epoch 1.*its next canvas is 1"):
            await store.commit("job", epoch, 0, b"d", tokens=10, denoising_steps=5, finish=finish)
    assert (await store.get("job")).state is JobState.RUNNING


@pytest.mark.parametrize("finish", [None, FinishReason.EOS])
async def test_a_gap_is_refused_and_ends_nothing(store: JobStore, finish: FinishReason | None) -> None:
    epoch = (await running(store)).epoch
    with pytest.raises(TransitionError, match="its next canvas is 0"):
        await store.commit("job", epoch, 1, b"c", tokens=10, denoising_steps=5, finish=finish)
    record = await store.get("job")
    assert (record.state, record.canvases) == (JobState.RUNNING, 0)


async def test_the_last_commit_ends_the_job_and_hands_its_slot_on(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    await store.submit(new_job("next"))
    await store.commit("job", epoch, 0, b"c", tokens=4, denoising_steps=5, finish=FinishReason.STOP)
    record = await store.get("job")
    assert (record.state, record.finish_reason) == (JobState.SUCCEEDED, FinishReason.STOP)
    assert (await store.get("next")).state is JobState.RUNNING


async def test_a_last_commit_whose_answer_was_lost_can_be_repeated(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    for _ in range(2):
        await store.commit("job", epoch, 0, b"c", tokens=4, denoising_steps=5, finish=FinishReason.EOS)
    with pytest.raises(TransitionError, match="the job is succeeded"):
        await store.commit("job", epoch, 0, b"c", tokens=4, denoising_steps=5, finish=FinishReason.LENGTH)
    assert (await store.get("job")).canvases == 1


async def test_a_last_commit_follows_its_own_plain_commit(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    await store.commit("job", epoch, 0, b"c", tokens=4, denoising_steps=5)
    await store.commit("job", epoch, 0, b"c", tokens=4, denoising_steps=5, finish=FinishReason.EOS)
    record = await store.get("job")
    assert (record.state, record.canvases, record.generated_tokens) == (JobState.SUCCEEDED, 1, 4)


async def test_an_earlier_canvas_cannot_be_the_last(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    for index in range(2):
        await store.commit("job", epoch, index, b"c", tokens=4, denoising_steps=5)
    with pytest.raises(TransitionError, match="its next canvas is 2"):
        await store.commit("job", epoch, 0, b"c", tokens=4, denoising_steps=5, finish=FinishReason.EOS)


async def test_a_stale_commit_leaves_no_trace(store: JobStore) -> None:
    epoch = (await running(store)).epoch
    with pytest.raises(StaleEpoch, match="job job: commit of canvas 0 under epoch 0 was refused"):
        await store.commit("job", epoch - 1, 0, b"z", tokens=4, denoising_steps=5, finish=FinishReason.EOS)
    assert await store.canvases("job") == []
