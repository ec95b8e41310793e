"""Driving a tensor-parallel group: rank 0 leads, the others follow.

Every rank has a whole engine on its shard and makes the same calls in the same order, because rank 0 sends what it did
since the last step along with the next one. No result travels back: it comes out equal on all ranks.
"""

from __future__ import annotations

from cluster.core import ModelCard
from deployments.engine.api import CanvasCheckpoint, Engine, EngineJob, EngineStats, StepReport
from deployments.engine.torch_tp.link import Command, Receiver, Sender


class LeadEngine:
    """Rank 0's engine, and through it the group's. Implements `deployments.engine.api.Engine`.

    `start` and `stop` act here at once, so that what is refused is refused here and sent nowhere; followers hear of
    them with the next step. `checkpoint` asks nobody: after its sum, the self-conditioning is here as a whole.
    """

    def __init__(self, engine: Engine, link: Sender) -> None:
        """Owns `engine`, which is this rank's, and `link`."""
        self._engine, self._link = engine, link
        self._log: list[Command] = []

    @property
    def card(self) -> ModelCard:
        return self._engine.card

    @property
    def slots(self) -> int:
        return self._engine.slots

    def start(self, job: EngineJob) -> None:
        """See `Engine.start`."""
        self._engine.start(job)
        self._log.append(job)

    def step(self) -> StepReport:
        """See `Engine.step`. Raises RuntimeError when a rank is dead, or stuck for longer than the group's timeout."""
        if not self._log and not self._engine.stats().active_jobs:
            return StepReport()
        try:
            self._link.send(self._log)
            self._log.clear()
            return self._engine.step()
        except (OSError, RuntimeError) as error:
            # The ranks may have come apart. Those that still wait for this one must not wait for long.
            self._end(goodbye=False)
            raise RuntimeError(f"the tensor-parallel group broke: {error}") from error

    def stop(self, job_id: str) -> None:
        """See `Engine.stop`."""
        self._engine.stop(job_id)
        self._log.append(job_id)

    def checkpoint(self, job_id: str) -> CanvasCheckpoint | None:
        """See `Engine.checkpoint`."""
        return self._engine.checkpoint(job_id)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._engine.stats()

    def lost(self) -> str | None:
        """See `Engine.lost`: which ranks have left. An idle group does not step, so it would not notice."""
        return self._link.lost()

    def close(self) -> None:
        """See `Engine.close`. The followers end too."""
        self._end(goodbye=True)

    def _end(self, *, goodbye: bool) -> None:
        self._link.close(goodbye=goodbye)
        self._engine.close()


def follow(engine: Engine, link: Receiver) -> None:
    """A follower's life: applies and steps what rank 0 sends, until it says goodbye.

    Raises OSError when rank 0 is gone and RuntimeError when the group breaks in a step; either way this rank must end.
    """
    while (log := link.receive()) is not None:
        for command in log:
            if isinstance(command, EngineJob):
                engine.start(command)
            else:
                engine.stop(command)
        engine.step()
