"""What a router knows of one job while it supervises it, for any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from cluster.errors import EaselError
from cluster.rpc.easel.v1 import generation_pb2 as v1

MAX_DRAFTS_BEHIND = 64


class Feed:
    """The events of one job: every committed canvas from the start, drafts as they come, and how it ended.

    Invariant: a reader gets each canvas from its offset on once, in order, then the end, however often the job moves.
    Drafts may be dropped for a reader that is slow; canvases never are, and there are at most max_context_tokens /
    canvas_tokens of them.
    """

    def __init__(self) -> None:
        self._canvases: list[v1.GenerateEvent] = []
        self._readers: set[asyncio.Queue[v1.GenerateEvent | None]] = set()
        self._end: v1.GenerateEvent | EaselError | None = None
        self.attached = 0  # callers whose leaving ends the job, counted by the services

    @property
    def ended(self) -> bool:
        """True once the job's end is known."""
        return self._end is not None

    @property
    def outcome(self) -> v1.GenerateEvent | EaselError | None:
        """How it ended: the `finished` event or the error; None before."""
        return self._end

    @property
    def next_canvas(self) -> int:
        """Index of the first canvas that is not here yet."""
        return len(self._canvases)

    def publish(self, event: v1.GenerateEvent) -> None:
        """Hand an event to every reader; `finished` must come through `end`.

        A canvas that is here already is dropped: it came before, from Redis or from an earlier run.
        """
        if event.HasField("committed"):
            if event.committed.canvas_index < self.next_canvas:
                return
            self._canvases.append(event)
        for reader in self._readers:
            if event.HasField("draft") and reader.qsize() >= MAX_DRAFTS_BEHIND:
                continue
            reader.put_nowait(event)

    def end(self, outcome: v1.GenerateEvent | EaselError) -> None:
        """Close the feed: the `finished` event, or the error every reader gets. Later calls change nothing."""
        if self._end is None:
            self._end = outcome
            for reader in self._readers:
                reader.put_nowait(None)

    async def read(self, *, from_canvas: int = 0, drafts: bool = False) -> AsyncGenerator[v1.GenerateEvent, None]:
        """Yield canvases from an index, drafts if wanted, then `finished`; raises the job's EaselError instead."""
        queue: asyncio.Queue[v1.GenerateEvent | None] = asyncio.Queue()
        for event in self._canvases:
            queue.put_nowait(event)
        if self.ended:
            queue.put_nowait(None)
        self._readers.add(queue)
        try:
            while (event_or_end := await queue.get()) is not None:
                if event_or_end.HasField("draft"):
                    if drafts:
                        yield event_or_end
                elif event_or_end.committed.canvas_index >= from_canvas:
                    yield event_or_end
        finally:
            self._readers.discard(queue)
        if isinstance(self._end, EaselError):
            raise self._end
        assert self._end is not None  # None in the queue is put by `end` alone
        yield self._end
