"""Reading a job from Redis alone: what a router does for jobs that another router, or none, supervises."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from cluster.core import Canvas
from cluster.errors import EaselError
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.v1 import generation_pb2 as v1
from deployments.endings import ending_of

MISSED_RING_S = 1.0


async def stored_canvases(store: JobStore, job_id: str, from_canvas: int = 0) -> list[Canvas]:
    """The committed canvases of a job from an index on."""
    stored = await store.canvases(job_id, from_canvas)
    return [convert.canvas_from_proto(pb.CommittedCanvas.FromString(item)) for item in stored]


async def watch_stored(
    store: JobStore,
    doorbell: Doorbell,
    job_id: str,
    from_canvas: int,
    *,
    interrupted: Callable[[], EaselError | None] = lambda: None,
    until: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[v1.GenerateEvent, None]:
    """Yield a job's canvases from an index on as they are committed, then `finished`.

    Ends early when `until` says so. Raises the job's EaselError when it ends otherwise, JobNotFound when there is no
    such job (any more), and what `interrupted` returns; both are asked at every ring, and after MISSED_RING_S.
    """
    async with doorbell.watch(job_id) as bell:
        while True:
            # The record is read before the canvases: once it says that the job has ended, all canvases are there.
            record = await store.get(job_id)
            if record.canvases > from_canvas:
                for canvas in await stored_canvases(store, job_id, from_canvas):
                    yield convert.committed_event(canvas)
                    from_canvas = canvas.index + 1
            if record.state.terminal:
                ending = ending_of(record)
                if isinstance(ending, EaselError):
                    raise ending
                yield ending
                return
            await bell.wait(MISSED_RING_S)
            stop = interrupted()
            if stop is not None:
                raise stop
            if until():
                return
