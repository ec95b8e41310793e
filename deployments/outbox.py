"""What a run has to tell its router, between the run and the stream that carries it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb

MAX_DRAFTS_BEHIND = 64


class Outbox:
    """The events of one run, for one reader.

    Invariant: canvases and the end reach a reader that stays, in order. Drafts are dropped while MAX_DRAFTS_BEHIND
    events wait, so what waits is bounded by that and the canvases of the job.
    """

    def __init__(self) -> None:
        self._events: asyncio.Queue[pb.RunEvent | None] = asyncio.Queue()
        self._left = False

    def put(self, event: pb.RunEvent) -> None:
        """Hand an event over, without waiting."""
        behind = event.HasField("draft") and self._events.qsize() >= MAX_DRAFTS_BEHIND
        if not (self._left or behind):
            self._events.put_nowait(event)

    def end(self) -> None:
        """Nothing more comes."""
        self._events.put_nowait(None)

    def leave(self) -> None:
        """The reader is gone for good: nothing is kept for it."""
        self._left = True
        while not self._events.empty():
            self._events.get_nowait()

    async def read(self) -> AsyncGenerator[pb.RunEvent, None]:
        """Yield what was put, up to the end."""
        while (event := await self._events.get()) is not None:
            yield event
