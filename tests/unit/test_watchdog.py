"""The watch over the length of a denoising step."""

from __future__ import annotations

import asyncio
from itertools import count

from deployments.watchdog import StepWatchdog

BOUND_S = 10.0


async def test_a_step_that_is_too_long_is_told_once() -> None:
    told: list[float] = []
    hung = asyncio.Event()

    def on_hung(busy_s: float) -> None:
        told.append(busy_s)
        hung.set()

    watchdog = StepWatchdog(lambda: 0.2, timeout_s=0.1, on_hung=on_hung)
    watchdog.begin()
    await asyncio.wait_for(hung.wait(), BOUND_S)
    await asyncio.sleep(0.05)
    await watchdog.close()
    assert told == [0.2]


async def test_steps_within_the_bound_are_let_be_and_looked_at_rarely() -> None:
    looks = count()
    watchdog = StepWatchdog(lambda: 0.0 * next(looks), timeout_s=0.1, on_hung=lambda _: None)
    watchdog.begin()
    await asyncio.sleep(0.35)
    await watchdog.close()
    assert 1 <= next(looks) <= 5
