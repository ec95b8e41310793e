"""All clients of a run: so many at once, and held back so that there is work whenever something is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cluster.chaos.jobs import ChaosJob
from cluster.chaos.transcript import Transcript

# Jobs that come at half of the load, then as many at the whole load.
GROUP_JOBS = 40

Read = Callable[[ChaosJob], Awaitable[Transcript]]


class Gate:
    """Lets jobs in strike by strike, so that a few jobs last for the first `strikes` strikes; then it is open.

    Invariant: job i enters once strike floor(i * strikes / jobs) is about to be made, or was given up.
    """

    def __init__(self, jobs: int, strikes: int) -> None:
        self._jobs = jobs
        self._strikes = strikes
        self._begun = 0 if strikes else 1
        self._changed = asyncio.Condition()

    async def open_for(self, strike_index: int) -> None:
        """Let the jobs of this strike and all before it in."""
        async with self._changed:
            self._begun = max(self._begun, strike_index + 1)
            self._changed.notify_all()

    async def enter(self, job_index: int) -> None:
        """Return when the job may begin."""
        async with self._changed:
            await self._changed.wait_for(lambda: job_index * self._strikes < self._begun * self._jobs)


class Crowd:
    """Reads jobs, in order, with a bound on how many are in flight."""

    def __init__(self, in_flight: int, ended: Callable[[], None]) -> None:
        """`ended` is called once for each job whose reader is done."""
        self._in_flight = in_flight
        self._ended = ended

    async def read_all(self, jobs: Sequence[ChaosJob], read: Read, gate: Gate | None = None) -> list[Transcript]:
        """The transcripts of all jobs, in the order of the jobs."""
        reading: dict[asyncio.Task[Transcript], int] = {}
        transcripts: dict[int, Transcript] = {}
        try:
            for job in jobs:
                if gate is not None:
                    await gate.enter(job.index)
                while len(reading) >= in_flight_at(job.index, self._in_flight):
                    await self._collect(reading, transcripts)
                task = asyncio.ensure_future(read(job))
                task.add_done_callback(lambda _: self._ended())
                reading[task] = job.index
            while reading:
                await self._collect(reading, transcripts)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
        return [transcripts[job.index] for job in jobs]

    async def _collect(self, reading: dict[asyncio.Task[Transcript], int], into: dict[int, Transcript]) -> None:
        done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            into[reading.pop(task)] = task.result()


def in_flight_at(job_index: int, in_flight: int) -> int:
    """The most jobs at once when this job begins: half of the load in every second group of jobs."""
    return in_flight if (job_index // GROUP_JOBS) % 2 else max(in_flight // 2, 1)
