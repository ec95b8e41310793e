"""Which waiting context joins the next step: a bounded number of tiles, from the waiting jobs in turn."""

from __future__ import annotations

from collections import deque

from deployments.engine.torch_tp.job import ActiveJob
from deployments.engine.torch_tp.plan import Tile


class PrefillQueue:
    """Jobs whose context is not encoded yet, in the order in which they are served.

    A step takes at most `tiles_per_step` tiles, so that a canvas in progress is never held up by more than that. One
    tile at a time and then the next job: a short prompt does not wait for the whole of a long one before it.
    """

    def __init__(self, tiles_per_step: int) -> None:
        self._tiles_per_step = tiles_per_step
        self._jobs: deque[ActiveJob] = deque()

    def add(self, job: ActiveJob) -> None:
        """The job is served last; one that waits for nothing is not taken in."""
        if job.waiting:
            self._jobs.append(job)

    def remove(self, job: ActiveJob) -> None:
        """Forgets a job, if it waits."""
        self._jobs = deque(waiting for waiting in self._jobs if waiting is not job)

    def choose(self) -> list[Tile]:
        """The next step's tiles. A tile that another job has computed meanwhile is shared and costs nothing."""
        tiles: list[Tile] = []
        while self._jobs and len(tiles) < self._tiles_per_step:
            job = self._jobs.popleft()
            job.adopt()
            if job.waiting:
                tiles.append(job.next_tile())
            self.add(job)
        return tiles
