"""Jobs that kill whatever runs them take no innocent job along."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.jobs.keys import Keys
from cluster.jobs.records import AssignedJob
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import commit, hello, new_job, on

LOST = AttemptEnd.REPLICA_LOST
_CANVASES = 3
_MOST_TICKS = 2000


@dataclass
class Replicas:
    """Replicas that denoise in ticks. A canvas takes `canvas_ticks`; a poison kills its replica after `fuse_ticks`.

    A killed one is replaced by another after `restart_ticks`, as Serve does. Its jobs are lost one by one, in any
    order, as their routers notice.
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
            await self.store.reap(job.job_id, job.epoch, LOST, "killed")
        await self.store.leave_replica(name, LOST, "killed")

    async def denoise(self, job: AssignedJob) -> None:
        self.ages[job] += 1
        if job.job_id.startswith("poison") or self.ages[job] % self.canvas_ticks:
            return
        index = (await self.store.get(job.job_id)).canvases
        await commit(self.store, job.job_id, job.epoch, index)
        if index + 1 == _CANVASES:
            await self.store.finish(job.job_id, job.epoch, FinishReason.LENGTH)


async def play(
    store: JobStore, seed: int, *, replicas: int, poisons: int, innocents: int
) -> tuple[Replicas, list[str]]:
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("replicas", "poisons"), [(1, 1), (2, 1), (2, 4)])
async def test_only_the_poison_fails_whatever_it_ran_with(
    store: JobStore, replicas: int, poisons: int, seed: int
) -> None:
    cluster, innocents = await play(store, seed, replicas=replicas, poisons=poisons, innocents=20)
    assert innocents == []
    # Poisons that meet share the blame: each killed once at least, and none more often than it may be lost.
    assert set(cluster.kills) == {f"poison-{number}" for number in range(poisons)}
    assert max(cluster.kills.values()) <= 3
    record = await store.get("poison-0")
    assert record.failure is not None
    assert record.failure.reason == "ATTEMPTS_EXHAUSTED"
    assert [attempt.reason for attempt in record.history] == [LOST] * 3


async def last_chances(store: JobStore, *job_ids: str, priority: Priority = Priority.NORMAL) -> None:
    """Jobs that wait and were lost twice, with a replica that is gone."""
    await store.heartbeat_replica(hello("scapegoat", slots=len(job_ids)))
    for job_id in job_ids:
        await store.submit(new_job(job_id, priority=priority))
    for job_id in job_ids:
        await store.reap(job_id, 1, LOST, "killed")
    await store.heartbeat_replica(hello("scapegoat", slots=len(job_ids)))
    assert await store.leave_replica("scapegoat", LOST, "killed") == len(job_ids)
    assert {(await store.get(job_id)).losses for job_id in job_ids} == {2}


async def test_a_last_chance_runs_apart_until_it_commits(store: JobStore) -> None:
    await store.heartbeat_replica(hello(slots=4))
    for job_id in ("one", "two"):
        await store.submit(new_job(job_id))
    # Lost twice elsewhere, while replica-1 had no slot for it.
    await store.heartbeat_replica(hello(slots=2))
    await last_chances(store, "last")
    await store.submit(new_job("next"))
    await store.heartbeat_replica(hello(slots=4))
    await store.assign()
    # The slots are kept for it, and nobody slips in while the others finish their canvas.
    assert await on(store, "last", "next") == ["", ""]
    await commit(store, "one", 1, 0)
    assert await on(store, "last", "next") == ["", ""]
    await commit(store, "two", 1, 0)
    assert await on(store, "last", "next") == ["replica-1", ""]
    await store.assign()
    assert await on(store, "next") == [""]
    await commit(store, "last", 3, 0)
    assert await on(store, "next") == ["replica-1"]


async def test_whoever_waits_behind_a_last_chance_goes_elsewhere(store: JobStore) -> None:
    await last_chances(store, "last")
    await store.submit(new_job("next"))
    for replica in ("replica-1", "replica-2"):
        await store.heartbeat_replica(hello(replica, slots=4))
    assert await on(store, "last", "next") == ["replica-1", "replica-2"]
    for number in range(3):
        await store.submit(new_job(f"more-{number}"))
    await store.submit(new_job("too-many"))
    assert await on(store, "more-0", "more-1", "more-2", "too-many") == ["replica-2"] * 3 + [""]


async def test_no_more_than_half_of_the_replicas_are_kept_for_last_chances(store: JobStore) -> None:
    names = [f"last-{number}" for number in range(4)]
    await last_chances(store, *names)
    for number in range(4):
        await store.submit(new_job(f"other-{number}"))
    for replica in ("a", "b", "c", "d"):
        await store.heartbeat_replica(hello(replica, slots=2))
    await store.assign()
    lasts = [replica for replica in await on(store, *names) if replica]
    others = await on(store, *(f"other-{number}" for number in range(4)))
    assert len(lasts) == len(set(lasts)) == 2
    assert all(others)
    assert not set(others) & set(lasts)


async def test_the_end_of_a_last_chance_opens_its_replica(store: JobStore) -> None:
    await last_chances(store, "last")
    await store.submit(new_job("next"))
    await store.heartbeat_replica(hello(slots=4))
    assert await on(store, "last", "next") == ["replica-1", ""]
    await store.finish("last", 3, FinishReason.EOS)
    assert await on(store, "next") == ["replica-1"]


async def test_a_last_chance_that_is_cancelled_in_the_queue_gives_the_kept_slots_free(store: JobStore) -> None:
    await last_chances(store, "last")
    await store.heartbeat_replica(hello(slots=0))
    for job_id in ("one", "two", "three"):
        await store.submit(new_job(job_id, priority=Priority.HIGH))
    await store.heartbeat_replica(hello(slots=4))
    await store.assign()
    await store.submit(new_job("next"))
    assert await on(store, "one", "last", "next") == ["replica-1", "", ""]
    await store.cancel("last")
    assert await on(store, "next") == ["replica-1"]


async def test_an_urgent_last_chance_asks_for_a_slot_once_it_could_run_there(
    store: JobStore, redis: Redis, namespace: str
) -> None:
    await store.heartbeat_replica(hello())
    await store.submit(new_job("batch", priority=Priority.BATCH))
    # Until its next heartbeat its slot is of no use to anybody.
    await redis.hset(Keys(namespace).replica("replica-1"), "suspect", 1)
    await last_chances(store, "last", priority=Priority.URGENT)
    asked = []
    for index in range(2):
        (order,) = (await store.heartbeat_replica(hello())).assigned
        asked.append((order.job_id, order.preempt))
        await commit(store, "batch", 1, index)
    assert asked == [("batch", False), ("batch", True)]
    await store.release("batch", 1, AttemptEnd.PREEMPTED, "made room")
    assert await on(store, "last", "batch") == ["replica-1", ""]
