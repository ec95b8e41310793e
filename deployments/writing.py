"""Writing to Redis while it may be away: the same call again, under the same epoch, within a bound."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cluster.errors import EaselError, Unavailable
from cluster.jobs.records import Checkpoint
from cluster.jobs.store import JobStore
from deployments.engine.api import CanvasCheckpoint

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 0.5
CLOSE_S = 5.0

Said = TypeVar("Said")


async def persist(call: Callable[[], Awaitable[Said]], patience_s: float) -> Said:
    """Repeat an idempotent call while Redis is away. Raises Unavailable after `patience_s`, other errors at once."""
    loop = asyncio.get_running_loop()
    give_up_s, retry_s = loop.time() + patience_s, FIRST_RETRY_S
    while True:
        try:
            return await call()
        except Unavailable:
            if loop.time() + retry_s >= give_up_s:
                raise
        await asyncio.sleep(retry_s)
        retry_s = min(2 * retry_s, LAST_RETRY_S)


def to_stored(checkpoint: CanvasCheckpoint) -> Checkpoint:
    """An engine's checkpoint as the store keeps it."""
    return Checkpoint(checkpoint.version, checkpoint.canvas_index, checkpoint.step, checkpoint.payload)


def from_stored(checkpoint: Checkpoint) -> CanvasCheckpoint:
    """A kept checkpoint as an engine takes it."""
    return CanvasCheckpoint(checkpoint.version, checkpoint.canvas_index, checkpoint.step, checkpoint.payload)


class Autosave:
    """Saves the periodic checkpoints of one run, beside its commits: only the newest, and only if Redis is well.

    A checkpoint that is not saved costs denoising steps after a crash, no canvas; so no error leaves this class.
    """

    def __init__(self, store: JobStore, job_id: str, epoch: int) -> None:
        self._store = store
        self._job_id = job_id
        self._epoch = epoch
        self._newest: CanvasCheckpoint | None = None
        self._task: asyncio.Task[None] | None = None

    def offer(self, checkpoint: CanvasCheckpoint) -> None:
        """Save this one next; one that still waits is forgotten."""
        self._newest = checkpoint
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._save(), name=f"checkpoints of {self._job_id}")

    async def close(self) -> None:
        """Stop saving."""
        self._newest = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CLOSE_S)

    async def _save(self) -> None:
        while (checkpoint := self._newest) is not None:
            self._newest = None
            try:
                await self._store.save_checkpoint(self._job_id, self._epoch, to_stored(checkpoint))
            except EaselError as error:
                logger.debug("job %s: a checkpoint was not saved: %s", self._job_id, error)
