"""What a denoiser replica tells of its load, for Serve to scale on."""

from __future__ import annotations

import asyncio
import logging

from cluster.errors import EaselError
from cluster.jobs.store import JobStore
from deployments.engine.api import Engine
from deployments.pace import Pace

logger = logging.getLogger(__name__)

# About as many of the last jobs count towards the mean.
_JOBS = 200


class Tally:
    """Counts the canvases of jobs that ended: what the next one is expected to ask for."""

    def __init__(self) -> None:
        self._jobs = self._canvases = 0.0

    def ended(self, canvases: int) -> None:
        """A job ended with so many canvases. Old ones count less and less."""
        keep = 1 - 1 / _JOBS
        self._jobs = self._jobs * keep + 1
        self._canvases = self._canvases * keep + canvases

    @property
    def canvases_per_job(self) -> float:
        """The mean; 0 when no job has ended."""
        return self._canvases / self._jobs if self._jobs else 0.0


class ReplicaLoad:
    """The numbers of one denoiser replica."""

    def __init__(self, engine: Engine, store: JobStore, tally: Tally) -> None:
        self._engine, self._store, self._tally = engine, store, tally
        self._pace = Pace()
        self._queued = 0
        self.start_s = 0.0

    async def read(self) -> dict[str, float]:
        """Named as deployments/scaling_policy.py reads them. While Redis is away, the queue is what it was."""
        stats = self._engine.stats()
        self._pace.mark(asyncio.get_running_loop().time(), stats)
        try:
            self._queued = await self._store.queued()
        except EaselError as error:
            logger.debug("the queue is taken to be what it was: %s", error)
        return {
            "queued_jobs": self._queued,
            "active_jobs": stats.active_jobs,
            "active_canvases": self._pace.active,
            "canvases_per_s": self._pace.canvases_per_s,
            "canvases_per_job": self._tally.canvases_per_job,
            "slots": self._engine.slots,
            "start_s": self.start_s,
        }
