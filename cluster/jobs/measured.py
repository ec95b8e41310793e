"""The job store, measured: how long each round trip takes, and what the replicas write."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from redis.asyncio import Redis

from cluster.config import StateSettings
from cluster.core import FinishReason, Placement, Usage
from cluster.errors import Unavailable
from cluster.jobs.records import Checkpoint, JobRecord
from cluster.jobs.scripts import Call, Reply
from cluster.jobs.store import Canvases, JobStore
from cluster.telemetry import metrics
from cluster.telemetry.recorder import Recorder, Unrecorded


class MeasuredJobStore(JobStore):
    """A JobStore that tells a recorder about itself; it does nothing else than a JobStore.

    A commit counts once: one that is repeated because its answer was lost was not counted the first time.
    """

    _recorder: Recorder = Unrecorded()

    @classmethod
    def recording(cls, recorder: Recorder, redis: Redis, state: StateSettings) -> Self:
        """A store as the settings say."""
        store = cls.of(redis, state)
        store._recorder = recorder
        return store

    async def commit(
        self,
        job_id: str,
        epoch: int,
        index: int,
        canvas: bytes,
        *,
        tokens: int,
        denoising_steps: int,
        finish: FinishReason | None = None,
    ) -> Usage | None:
        """See JobStore."""
        usage = await super().commit(
            job_id, epoch, index, canvas, tokens=tokens, denoising_steps=denoising_steps, finish=finish
        )
        self._recorder.add(metrics.COMMITS)
        self._recorder.add(metrics.TOKENS, tokens)
        self._recorder.observe(metrics.STEPS_PER_CANVAS, denoising_steps)
        return usage

    async def placement(self, job_id: str) -> Placement | None:
        """See JobStore."""
        with self._timed("placement"):
            return await super().placement(job_id)

    async def epochs(self, job_ids: Sequence[str]) -> dict[str, int]:
        """See JobStore."""
        with self._timed("epochs"):
            return await super().epochs(job_ids)

    async def checkpoint(self, job_id: str) -> Checkpoint | None:
        """See JobStore."""
        with self._timed("read_checkpoint"):
            return await super().checkpoint(job_id)

    async def get(self, job_id: str) -> JobRecord:
        """See JobStore."""
        with self._timed("get"):
            return await super().get(job_id)

    async def canvases(self, job_id: str, from_index: int = 0) -> Canvases:
        """See JobStore."""
        with self._timed("canvases"):
            return await super().canvases(job_id, from_index)

    async def images(self, job_id: str) -> bytes | None:
        """See JobStore."""
        with self._timed("images"):
            return await super().images(job_id)

    async def waiting(self) -> dict[int, int]:
        """See Processes."""
        with self._timed("waiting"):
            return await super().waiting()

    async def _run_all(self, calls: tuple[Call, ...], job_id: str = "", tried: str = "") -> tuple[Reply, ...]:
        with self._timed("+".join(call.name for call in calls)):
            return await super()._run_all(calls, job_id, tried)

    @contextmanager
    def _timed(self, op: str) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        except Unavailable:
            self._recorder.add(metrics.REDIS_ERRORS, op=op)
            raise
        finally:
            self._recorder.observe(metrics.REDIS, time.perf_counter() - began_s, op=op)
