"""The ground that random histories stand on: one namespace, a model of what was accepted, and what was seen last.

Time is made, not waited for: a lease ends by its score in Redis, an outage and its end by the fields of the pulse,
and a long wait by the score in `waiting`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from redis.asyncio import Redis

from cluster.core import Priority
from cluster.errors import EaselError, QuotaExceeded, ReplicaNotFound, StaleEpoch, TransitionError
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.records import Checkpoint, JobRecord
from cluster.jobs.states import TRANSITIONS, Action, AttemptEnd, JobState
from cluster.jobs.store import JobStore
from tests.redis.helpers import hello, new_job
from tests.redis.observing import Bounds, check, observe

T = TypeVar("T")

BOUNDS = Bounds(max_attempts=3, max_preemptions=2, running={"one": 1, "two": 2}, queued={"two": 4})
TENANTS = ["free", "one", "two"]
REPLICAS = {"replica-1": 2, "replica-2": 1, "replica-3": 3}
NAMESPACE = "history"
KEYS = Keys(NAMESPACE)
PULSE = f"{KEYS.base}:pulse"
WAITING = f"{KEYS.base}:waiting"


def rows_of(bounds: Bounds) -> dict[str, str]:
    """What the bounds say of tenants, as the scripts read it."""
    tenants = {*bounds.running, *bounds.queued}
    return {name: f"{bounds.running.get(name, '-')} {bounds.queued.get(name, '-')} - -" for name in tenants}


class History(RuleBasedStateMachine):
    """`canvases` and `saved` are what was accepted; the rest is judged by what was seen one step before."""

    url = ""

    @initialize(priorities=st.lists(st.sampled_from(Priority), min_size=7, max_size=10))
    def open(self, priorities: list[Priority]) -> None:
        """More jobs than slots, so that every history starts busy."""
        self.runner = asyncio.Runner()
        self.redis: Redis = connect(self.url)
        self.store = JobStore(self.redis, namespace=NAMESPACE, lease_ms=60_000, max_preemptions=BOUNDS.max_preemptions)
        self.canvases: dict[str, list[bytes]] = {}
        self.saved: dict[str, Checkpoint] = {}
        self.runs: dict[tuple[str, int], str] = {}
        self.believed = True
        self.run(self.redis.flushdb())
        for replica, slots in REPLICAS.items():
            self.run(self.store.heartbeat_replica(hello(replica, slots=slots)))
        self.run(self.store.heartbeat_router("router-1"))
        self.run(self.redis.hset(PULSE, "grace_ms", 1))
        self.bounds = BOUNDS
        self.run(self.store.set_quotas(rows_of(self.bounds)))
        self.seen = self.run(observe(self.redis, NAMESPACE))
        for number, priority in enumerate(priorities):
            self.submit_one(priority, "router-1", TENANTS[number % 3])

    def submit_one(self, priority: Priority, router: str, tenant: str) -> None:
        # Under an id of its tenant's own, but for those of one tenant, which needs no credentials.
        job = f"job-{len(self.canvases):02d}" if tenant == "free" else f"{tenant}/job-{len(self.canvases):02d}"
        most, waits = self.bounds.queued.get(tenant), self.count_waiting(tenant)
        write = self.store.submit(new_job(job, priority=priority, router=router, tenant=tenant))
        try:
            created, placement = self.run(write)
        except QuotaExceeded:
            assert most is not None
            assert waits >= most
            return
        assert most is None or waits < most
        self.canvases[job] = []
        self.look_again()
        record = self.seen.records[job]
        assert created
        assert (placement is not None) == (record.state is JobState.RUNNING)
        assert (record.router, record.priority) == (router, priority)

    def count_waiting(self, tenant: str) -> int:
        """Jobs that wait and count: those that came while their tenant had no limit do not."""
        queued = (job for job, record in self.seen.records.items() if record.state is JobState.QUEUED)
        rows = [self.seen.keys["job"][job] for job in queued if self.seen.records[job].tenant == tenant]
        return sum(b"counted" in row for row in rows)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.store.close())
            self.runner.close()

    def run(self, call: Awaitable[T]) -> T:
        return self.runner.run(asyncio.wait_for(call, 10.0))

    def refused(self, call: Coroutine[Any, Any, object]) -> EaselError | None:
        """Make a write; the error when it was refused. Looks at what became of it."""
        error = None
        try:
            self.run(call)
        except (TransitionError, ReplicaNotFound) as caught:
            error = caught
        self.look_again()
        return error

    def look_again(self) -> None:
        before, self.seen = self.seen, self.run(observe(self.redis, NAMESPACE))
        for job, record in self.seen.records.items():
            self.follow(before.records.get(job), record)
        apart = self.seen.texts("apart").values()
        for job in self.seen.members("marked") - before.members("marked"):
            replica = self.seen.records[job].replica
            assert self.seen.takes_jobs(replica)
            assert replica not in apart

    def follow(self, before: JobRecord | None, record: JobRecord) -> None:
        """What no step may do to a job."""
        key = (record.job_id, record.epoch)
        if record.epoch:
            assert self.runs.setdefault(key, record.replica) == record.replica
        assert record.epoch == record.attempts
        if before is None:
            return
        assert before.epoch <= record.epoch <= before.epoch + 1
        assert before.epoch == record.epoch or self.seen.takes_jobs(record.replica)
        assert (before.created_ms, before.deadline_ms, before.seed) == (
            record.created_ms,
            record.deadline_ms,
            record.seed,
        )
        assert before.started_ms in (None, record.started_ms)
        assert record.history[: len(before.history)] == before.history
        if before.state.terminal:
            assert replace(before, now_ms=0) == replace(record, now_ms=0)

    def live_routers(self) -> set[str]:
        return {router for router in self.seen.scores("routers") if self.seen.is_live("routers", router)}

    def pick(self, number: int) -> str:
        """Mostly a job that runs."""
        jobs = sorted(self.seen.running) * 3 + sorted(self.canvases)
        return jobs[number % len(jobs)]

    def epoch(self, job: str, ago: int) -> int:
        return max(0, self.seen.records[job].epoch - ago)

    def checkpoint(self, job: str, offset: int, step: int) -> Checkpoint:
        return Checkpoint("v1", max(0, len(self.canvases[job]) + offset), step, b"tokens of %d" % step)

    def keep(self, job: str, checkpoint: Checkpoint) -> None:
        if checkpoint.canvas_index == len(self.canvases[job]):
            self.saved[job] = checkpoint

    def attempt(
        self,
        job: str,
        action: Action,
        write: Coroutine[Any, Any, object],
        *,
        epoch: int | None,
        fits: bool = True,
        repeated: bool = False,
    ) -> bool:
        """Make a write that may be refused; true when it did what `action` says."""
        before = self.seen.records[job]
        stale = epoch not in (None, before.epoch)
        # Whoever gives an epoch claims to run the job: it cannot do so while the job waits.
        may = epoch is None or before.state is not JobState.QUEUED
        moves = (before.state, action) in TRANSITIONS and not stale and fits and may
        error = self.refused(write)
        if error is not None:
            assert isinstance(error, StaleEpoch) == stale
            assert not moves
            return False
        # What is neither refused nor moves the job is a write repeated word for word after its end.
        assert moves or repeated or (before.state.terminal and not stale)
        return moves

    def check_requeued(self, before: JobRecord, end: AttemptEnd, message: str) -> None:
        """RUNNING -> QUEUED as it should be; the job may run again by now."""
        after = self.seen.records[before.job_id]
        attempt = after.history[-1]
        assert (attempt.epoch, attempt.replica) == (before.epoch, before.replica)
        assert (attempt.reason, attempt.message) == (end, message)
        losses = before.losses + int(end.is_loss)
        assert after.losses == losses
        if losses == BOUNDS.max_attempts:
            assert after.state is JobState.FAILED
            assert after.failure is not None
            assert after.failure.reason == "ATTEMPTS_EXHAUSTED"
        else:
            assert after.state in (JobState.QUEUED, JobState.RUNNING)
            assert after.epoch == before.epoch + int(after.state is JobState.RUNNING)
            assert after.preemptions == before.preemptions + int(end is AttemptEnd.PREEMPTED)

    @invariant()
    def redis_agrees_with_the_model_and_leaks_nothing(self) -> None:
        if hasattr(self, "seen"):
            assert {job: self.seen.canvases(job) for job in self.seen.records} == self.canvases
            alive = {job: saved for job, saved in self.saved.items() if job in self.seen.alive}
            assert self.seen.checkpoints == alive
            check(self.seen, self.bounds)
