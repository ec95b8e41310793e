"""When jobs had to wait for a slot during a run: such times are no failover."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import NoReturn

from cluster.client import EaselClient
from cluster.errors import EaselError

_LOOK_S = 0.25
_ANSWER_S = 2.0


class QueueWatch:
    """Looks at the queue until it is cancelled. `waited_at_s` are the looks that found somebody waiting (monotonic)."""

    def __init__(self, client: EaselClient) -> None:
        self._client = client
        self.waited_at_s: list[float] = []

    async def run(self) -> NoReturn:
        """Look on and on; a cluster that does not answer is asked again."""
        while True:
            with contextlib.suppress(EaselError, TimeoutError):
                async with asyncio.timeout(_ANSWER_S):
                    if (await self._client.status()).queued:
                        self.waited_at_s.append(time.monotonic())
            await asyncio.sleep(_LOOK_S)
