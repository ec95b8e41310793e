"""One job's events for many readers."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import JobCancelled
from cluster.rpc.easel.v1 import generation_pb2 as v1
from deployments.feed import MAX_DRAFTS_BEHIND, Feed

FINISHED = v1.GenerateEvent(finished=v1.Finished(replica="r"))


def committed(index: int) -> v1.GenerateEvent:
    return v1.GenerateEvent(committed=v1.Committed(canvas_index=index))


def draft(step: int) -> v1.GenerateEvent:
    return v1.GenerateEvent(draft=v1.Draft(step=step))


async def everything(feed: Feed, *, from_canvas: int = 0, drafts: bool = False) -> list[v1.GenerateEvent]:
    return [event async for event in feed.read(from_canvas=from_canvas, drafts=drafts)]


async def test_a_reader_that_comes_late_gets_every_canvas_once() -> None:
    feed = Feed()
    feed.publish(committed(0))
    early = asyncio.create_task(everything(feed))
    await asyncio.sleep(0)
    feed.publish(committed(1))
    feed.end(FINISHED)
    expected = [committed(0), committed(1), FINISHED]
    assert await early == expected
    assert await everything(feed) == expected


async def test_a_reader_with_an_offset_gets_the_rest() -> None:
    feed = Feed()
    for index in range(3):
        feed.publish(committed(index))
    feed.end(FINISHED)
    assert await everything(feed, from_canvas=2) == [committed(2), FINISHED]


async def test_drafts_reach_only_who_wants_them_and_are_not_kept() -> None:
    feed = Feed()
    with_drafts = asyncio.create_task(everything(feed, drafts=True))
    without = asyncio.create_task(everything(feed))
    await asyncio.sleep(0)
    feed.publish(draft(1))
    feed.end(FINISHED)
    assert await with_drafts == [draft(1), FINISHED]
    assert await without == [FINISHED]
    assert await everything(feed, drafts=True) == [FINISHED]


async def test_a_slow_reader_loses_drafts_but_no_canvas() -> None:
    feed = Feed()
    slow = asyncio.create_task(everything(feed, drafts=True))
    await asyncio.sleep(0)
    for step in range(3 * MAX_DRAFTS_BEHIND):
        feed.publish(draft(step))
    feed.publish(committed(0))
    feed.end(FINISHED)
    got = await slow
    assert got[-2:] == [committed(0), FINISHED]
    assert len(got) == MAX_DRAFTS_BEHIND + 2


async def test_an_error_ends_every_reader_and_the_first_ending_stays() -> None:
    feed = Feed()
    reader = asyncio.create_task(everything(feed))
    await asyncio.sleep(0)
    feed.end(JobCancelled("gone"))
    feed.end(FINISHED)
    with pytest.raises(JobCancelled):
        await reader
    with pytest.raises(JobCancelled):
        await everything(feed)
