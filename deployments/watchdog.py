"""Finds a denoising step that does not end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SHORTEST_LOOK_S = 0.01


class StepWatchdog:
    """Calls `on_hung` once, when `busy_s()` has gone beyond `timeout_s`; looks no more often than that needs."""

    def __init__(self, busy_s: Callable[[], float], *, timeout_s: float, on_hung: Callable[[float], None]) -> None:
        self._busy_s = busy_s
        self._timeout_s = timeout_s
        self._on_hung = on_hung
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start to look."""
        self._task = asyncio.create_task(self._run(), name="step watchdog")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            busy_s = self._busy_s()
            if busy_s > self._timeout_s:
                break
            # The step in progress, or one that starts now, cannot have run for too long before then.
            await asyncio.sleep(max(self._timeout_s - busy_s, SHORTEST_LOOK_S))
        self._on_hung(busy_s)
