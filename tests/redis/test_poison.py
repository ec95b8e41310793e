"""Jobs that kill whatever runs them take no innocent job along."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest

from cluster.core import FinishReason
from cluster.jobs.records import AssignedJob
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import commit, hello, new_job, on, running

_CANVASES = 3
_MOST_TICKS = 2000


@dataclass
class Replicas:
    """Replicas that denoise in ticks. A canvas takes `canvas_ticks`; a poison kills its replica after `fuse_ticks`.

    A killed one is replaced by another after `restart_ticks`, as Serve does. Its jobs are lost one by one, in any order,
    as their routers notice.
    """

    store: JobStore
    random: Random
    canvas_ticks: int
    fuse_ticks: int
    restart_ticks: int
    slots: int = 8
    names: list[str] = field(default_factory=list)
    coming: list[int] = field(default_factory=list)
    ages: Counter[AssignedJob] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)

    async def tick(self) -> None:
        self.coming = [ticks - 1 for ticks in self.coming]
        for _ in range(self.coming.count(0)):
            self.names.append(f"replica-{sum(self.kills.values())}-{len(self.names)}")
        for name in list(self.names):
            jobs = list((await self.store.heartbeat_replica(hello(name, slots=self.slots))).assigned)
            poisons = [job for job in jobs if job.job_id.startswith("poison") and self.ages[job] >= self.fuse_ticks]
            if poisons:
                await self.die(name, poisons[0], jobs)
            else:
                for job in jobs:
                    await self.denoise(job)

    async def die(self, name: str, poison: AssignedJob, jobs: list[AssignedJob]) -> None:
        self.kills[poison.job_id] += 1
        self.names.remove(name)
        self.coming.append(self.restart_ticks + 1)
        self.random.shuffle(jobs)
        for job in jobs:
            await self.store.reap(job.job_id, job.epoch, AttemptEnd.REPLICA_LOST, "killed")
        await self.store.leave_replica(name, AttemptEnd.REPLICA_LOST, "killed")

    async def denoise(self, job: AssignedJob) -> None:
        self.ages[job] += 1
        if job.job_id.startswith("poison") or self.ages[job] % self.canvas_ticks:
            return
        index = (await self.store.get(job.job_id)).canvases
        await commit(self.store, job.job_id, job.epoch, index)
        if index + 1 == _CANVASES:
            await self.store.finish(job.job_id, job.epoch, FinishReason.LENGTH)


async def play(store: JobStore, seed: int, *, replicas: int, poisons: int, innocents: int) -> tuple[Replicas, list[str]]:
    """Run all jobs to their end; returns the innocent ones that failed."""
    random = Random(seed)
    bounds = (random.randint(2, 8), random.randint(1, 10), random.randint(0, 12))
    cluster = Replicas(store, random, *bounds, names=[f"replica-{number}" for number in range(replicas)])
    jobs = [*(f"poison-{number}" for number in range(poisons)), *(f"innocent-{number}" for number in range(innocents))]
    random.shuffle(jobs)
    for job_id in jobs:
        await store.submit(new_job(job_id))
    for _ in range(_MOST_TICKS):
        states = {job_id: (await store.get(job_id)).state for job_id in jobs}
        if all(state.terminal for state in states.values()):
            break
        await cluster.tick()
    assert all(state.terminal for state in states.values())
    failed = [job_id for job_id, state in states.items() if state is JobState.FAILED]
    assert {job_id for job_id in jobs if job_id.startswith("poison")} <= set(failed)
    return cluster, [job_id for job_id in failed if job_id.startswith("innocent")]
