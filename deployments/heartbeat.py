"""What a process does again and again for as long as it is well: renew its lease, look at the queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.errors import EaselError

logger = logging.getLogger(__name__)


class Heartbeat:
    """Calls `beat` every `every_s` seconds until closed. A failed beat is logged once, and when beats are back."""

    def __init__(self, beat: Callable[[], Awaitable[None]], *, every_s: float, name: str) -> None:
        self._beat = beat
        self._every_s = every_s
        self._name = name
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Beat once, so that a process that cannot register does not come up, then go on beside."""
        await self._beat()
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Stop beating; a lease then runs out unless it is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._beat()
            except EaselError as error:
                if not self._failing:
                    logger.warning("%s: failed, and is tried again: %s", self._name, error)
                self._failing = True
            else:
                if self._failing:
                    logger.info("%s: works again", self._name)
                self._failing = False
