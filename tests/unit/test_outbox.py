"""What waits between a run and its stream."""

from __future__ import annotations

from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from deployments.outbox import MAX_DRAFTS_BEHIND, Outbox


def draft(step: int) -> pb.RunEvent:
    return pb.RunEvent(draft=pb.DraftCanvas(step=step))


def canvas(index: int) -> pb.RunEvent:
    return pb.RunEvent(committed=pb.CommittedCanvas(canvas_index=index))


async def read(outbox: Outbox) -> list[pb.RunEvent]:
    return [event async for event in outbox.read()]


async def test_events_come_in_order_up_to_the_end() -> None:
    outbox = Outbox()
    events = [draft(1), canvas(0), draft(1), canvas(1)]
    for event in events:
        outbox.put(event)
    outbox.end()
    assert await read(outbox) == events


async def test_a_reader_that_is_slow_loses_drafts_and_no_canvas() -> None:
    outbox = Outbox()
    for step in range(10 * MAX_DRAFTS_BEHIND):
        outbox.put(draft(step))
    for index in range(3):
        outbox.put(canvas(index))
        outbox.put(draft(0))
    outbox.end()
    events = await read(outbox)
    assert len(events) == MAX_DRAFTS_BEHIND + 3
    assert events[-3:] == [canvas(0), canvas(1), canvas(2)]


async def test_nothing_is_kept_for_a_reader_that_left() -> None:
    outbox = Outbox()
    outbox.put(canvas(0))
    outbox.leave()
    outbox.put(canvas(1))
    outbox.end()
    assert await read(outbox) == []
