"""One assignment of one job on a replica, from its start to its end there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.core import JobSpec
from cluster.errors import EaselError
from cluster.jobs.records import AssignedJob
from deployments.answer import Answer
from deployments.engine.api import Commit, Progress


def attempt_key(job: AssignedJob) -> str:
    """The engine's id of an assignment: an epoch never comes twice, so a stop never meets a later attempt."""
    return f"{job.job_id}#{job.epoch}"


@dataclass(eq=False)
class Attempt:
    """A job under an epoch. `events` come in the order in which the engine made them; an error ends the attempt."""

    spec: JobSpec
    epoch: int
    answer: Answer
    wants_drafts: bool
    events: asyncio.Queue[Progress | Commit | EaselError] = field(default_factory=asyncio.Queue)

    @property
    def assignment(self) -> AssignedJob:
        """The job and epoch as Redis names them."""
        return AssignedJob(self.spec.job_id, self.epoch)

    @property
    def key(self) -> str:
        """The engine's id of it."""
        return attempt_key(self.assignment)
