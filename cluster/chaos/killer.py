"""Carries the schedule out: one strike after the other, each once it leaves another of its kind alive."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

import psutil

from cluster.chaos.crowd import Gate
from cluster.chaos.recovery import Kill
from cluster.chaos.schedule import KillKind, Strike, draw_strike, pick_one
from cluster.chaos.targets import Target, Targets
from cluster.client import EaselClient
from cluster.errors import EaselError

PATIENCE_S = 40.0
_LOOK_S = 0.2
_WORK_PATIENCE_S = 2.0
# The warden takes a Redis that dies 5 times in 60 s for one that cannot run, and stops the cluster.
_REDIS_REST_S = 15.0
_VERBS = {KillKind.FREEZE: "froze", KillKind.DRAIN: "drained"}


class Killer:
    """Makes the strikes of a seed until it is cancelled. `kills` are those made; `skipped` counts those given up."""

    def __init__(
        self,
        targets: Targets,
        client: EaselClient,
        gate: Gate,
        *,
        seed: int,
        every_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._targets = targets
        self._client = client
        self._gate = gate
        self._seed = seed
        self._every_s = every_s
        self._say = say
        self._frozen: dict[psutil.Process, asyncio.Task[None]] = {}
        self.kills: list[Kill] = []
        self.skipped: Counter[KillKind] = Counter()

    async def run(self) -> NoReturn:
        """Strike on and on. Every process that it froze runs again when this ends, in every case."""
        index = 0
        try:
            while True:
                next_s = time.monotonic() + self._every_s
                struck = await self._strike(draw_strike(self._seed, index))
                await asyncio.sleep(max(next_s - time.monotonic(), 0) if struck else _LOOK_S)
                index += 1
        finally:
            self._thaw_all()

    async def _strike(self, strike: Strike) -> bool:
        """False when it is left out: there is nothing that it could ever hit, or it comes too soon."""
        if not self._targets.ever(strike.kind) or self._redis_rests(strike.kind):
            self.skipped[strike.kind] += 1
            await self._gate.open_for(strike.index)
            return False
        target = await self._target(strike)
        if target is None or not await self._hit(strike, target):
            self.skipped[strike.kind] += 1
            self._say(f"{strike.kind.value}: nothing could be hit")
        return True

    def _redis_rests(self, kind: KillKind) -> bool:
        hits_s = [kill.at_s for kill in self.kills if kill.kind is kind is KillKind.REDIS]
        return bool(hits_s) and time.monotonic() - hits_s[-1] < _REDIS_REST_S

    async def _target(self, strike: Strike) -> Target | None:
        """Wait until something may be hit, let jobs in, and choose; None when that takes too long."""
        possible = await self._find(strike.kind, PATIENCE_S, bool)
        await self._gate.open_for(strike.index)
        if not possible:
            return None
        await asyncio.sleep(strike.delay_s)
        at_work = await self._find(
            strike.kind, _WORK_PATIENCE_S, lambda targets: any(target.jobs for target in targets)
        )
        return pick_one(at_work, strike.pick) if at_work else None

    async def _find(self, kind: KillKind, patience_s: float, enough: Callable[[list[Target]], bool]) -> list[Target]:
        """Look until what is found is enough, or for so long; returns what was found last."""
        give_up_s = time.monotonic() + patience_s
        while True:
            targets = await self._targets.now(kind)
            if enough(targets) or time.monotonic() > give_up_s:
                return targets
            await asyncio.sleep(_LOOK_S)

    async def _hit(self, strike: Strike, target: Target) -> bool:
        kill = Kill(strike.kind, time.monotonic(), target.name, target.replica, target.had_room)
        try:
            await self._do(strike, target)
        except (psutil.NoSuchProcess, EaselError):
            return False  # it had gone by itself
        self.kills.append(kill)
        self._say(f"{_VERBS.get(strike.kind, 'killed')} {target.name}")
        return True

    async def _do(self, strike: Strike, target: Target) -> None:
        if strike.kind is KillKind.DRAIN:
            await self._client.drain(target.replica)
        elif strike.kind is KillKind.FREEZE:
            target.process.suspend()
            self._frozen[target.process] = asyncio.create_task(self._thaw_later(target, strike.freeze_s))
        else:
            target.process.kill()

    async def _thaw_later(self, target: Target, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._thaw(target.process)
        self._say(f"let {target.name} go on after {after_s:.1f} s")

    def _thaw(self, process: psutil.Process) -> None:
        self._frozen.pop(process, None)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()

    def _thaw_all(self) -> None:
        for process, task in list(self._frozen.items()):
            task.cancel()
            self._thaw(process)
