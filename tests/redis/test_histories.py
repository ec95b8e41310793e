"""Random histories of one namespace, checked against a model and against the invariants after every step."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from cluster.core import FinishReason, Priority
from cluster.errors import StaleEpoch, TransitionError
from cluster.jobs.connection import connect
from cluster.jobs.keys import Keys
from cluster.jobs.states import TRANSITIONS, Action, JobState
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from tests.redis.helpers import BROKEN, hello, new_job

T = TypeVar("T")

REPLICAS = {"replica-1": 2, "replica-2": 1}
jobs = st.sampled_from([f"job-{number}" for number in range(5)])
# Every assignment here is the first, so 1 is the epoch of each job that runs; the others are zombies.
epochs = st.sampled_from([1, 1, 1, 0, 2])


class Histories(RuleBasedStateMachine):
    """`model` holds the state that each submitted job must be in by the table of moves."""

    url = ""

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        namespace = f"history-{uuid.uuid4().hex[:12]}"
        self.keys = Keys(namespace)
        self.redis: Redis = connect(self.url)
        self.store = JobStore(self.redis, namespace=namespace, lease_ms=60_000)
        self.model: dict[str, JobState] = {}
        self.canvases: dict[str, list[bytes]] = {}
        for replica, slots in REPLICAS.items():
            self.run(self.store.heartbeat_replica(hello(replica, slots=slots)))

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.store.close())
            self.runner.close()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(call, 10.0))

    @rule(job=jobs, priority=st.sampled_from(Priority))
    def submit(self, job: str, priority: Priority) -> None:
        created, _ = self.run(self.store.submit(new_job(job, priority=priority)))
        assert created == (job not in self.model)
        self.model.setdefault(job, JobState.QUEUED)
        self.canvases.setdefault(job, [])

    @rule()
    def assign(self) -> None:
        assert self.run(self.store.assign()) == 0  # a freed slot never waits for somebody to look

    @rule(job=jobs, epoch=epochs, back=st.integers(-1, 1), last=st.booleans())
    def commit(self, job: str, epoch: int, back: int, last: bool) -> None:
        """The next canvas (0), the one before it again (-1), or one too far (1), by anybody."""
        if job not in self.model:
            return
        stored = self.canvases[job]
        index = max(0, len(stored) + back)
        canvas = b"%s %d" % (job.encode(), index)
        fits = index == len(stored) or (index < len(stored) and (not last or index == len(stored) - 1))
        finish = FinishReason.EOS if last else None
        write = self.store.commit(job, epoch, index, canvas, tokens=1, denoising_steps=1, finish=finish)
        moved = self.attempt(job, Action.finish if last else Action.commit, write, epoch=epoch, fits=fits)
        if moved and index == len(stored):
            stored.append(canvas)

    @rule(job=jobs, epoch=epochs)
    def finish(self, job: str, epoch: int) -> None:
        self.attempt(job, Action.finish, self.store.finish(job, epoch, FinishReason.LENGTH), epoch=epoch)

    @rule(job=jobs, epoch=st.none() | epochs)
    def fail(self, job: str, epoch: int | None) -> None:
        self.attempt(job, Action.fail, self.store.fail(job, BROKEN, epoch=epoch), epoch=epoch)

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        if job in self.model:
            self.model[job] = TRANSITIONS.get((self.model[job], Action.cancel), self.model[job])
            assert self.run(self.store.cancel(job)).state is self.model[job]

    def attempt(
        self, job: str, action: Action, write: Coroutine[Any, Any, object], *, epoch: int | None, fits: bool = True
    ) -> bool:
        """Make a write that may be refused; true when it moved the job or appended to it."""
        if job not in self.model:
            write.close()
            return False
        before = self.run(self.store.get(job))
        stale = epoch not in (None, before.epoch)
        # Whoever gives an epoch claims to run the job: it cannot do so while the job waits.
        may = epoch is None or before.state is not JobState.QUEUED
        moves = (before.state, action) in TRANSITIONS and not stale and fits and may
        try:
            self.run(write)
        except StaleEpoch:
            assert stale
            return False
        except TransitionError:
            assert not stale
            assert not moves
            return False
        # What is neither refused nor moves the job is a write repeated word for word after its end.
        assert moves or (before.state.terminal and not stale)
        if moves:
            self.model[job] = TRANSITIONS[before.state, action]
        return moves

    @invariant()
    def redis_agrees_with_the_model_and_leaks_nothing(self) -> None:
        if not hasattr(self, "runner"):
            return
        records = {job: self.run(self.store.get(job)) for job in self.model}
        # Only the placing of waiting jobs is left to Redis.
        for job, record in records.items():
            if self.model[job] is JobState.QUEUED and record.state is JobState.RUNNING:
                self.model[job] = JobState.RUNNING
            assert record.state is self.model[job]
            assert record.canvases == len(self.canvases[job])
            assert self.run(self.store.canvases(job)) == self.canvases[job]
        self.check_slots({job: r.replica for job, r in records.items() if r.state is JobState.RUNNING})
        queued = [job for job, record in records.items() if record.state is JobState.QUEUED]
        view = self.run(self.store.view())
        assert view.queued == len(queued)
        assert not queued or all(row.active == row.slots for row in view.replicas)

    def check_slots(self, owners: dict[str, str]) -> None:
        held: dict[str, str] = {}
        for replica, slots in REPLICAS.items():
            rows = self.run(self.store.heartbeat_replica(hello(replica, slots=slots)))
            assert len(rows) <= slots
            for row in rows:
                assert row.job_id not in held
                held[row.job_id] = replica
        assert held == owners


def test_no_history_leaks_a_slot_or_moves_an_ended_job(redis_server: RedisServer) -> None:
    class Served(Histories):
        url = redis_server.url

    short = settings(
        deadline=None, max_examples=15, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(Served, settings=short)
