"""Random histories of one namespace; after every step Redis is held to a model and to what observing.py says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from cluster.core import FinishReason, Priority
from cluster.errors import ReplicaNotFound
from cluster.jobs.states import TRANSITIONS, Action, AttemptEnd
from cluster.policy.ordering import OLDEST
from cluster.redis_server import RedisServer
from tests.redis.helpers import BROKEN, hello, new_job
from tests.redis.history import BOUNDS, KEYS, PULSE, REPLICAS, TENANTS, WAITING, History, rows_of
from tests.redis.observing import Observation

MOST_JOBS = 24
# Which of the jobs that there are: History.pick says which one.
jobs = st.integers(0, 255)
replicas = st.sampled_from(list(REPLICAS))
tenants = st.sampled_from(TENANTS)
limits = st.sampled_from([1, 2, 3, None])
routers = st.sampled_from(["router-1", "router-2", "router-3"])
ends = st.sampled_from(AttemptEnd)
losses = st.sampled_from([end for end in AttemptEnd if end.is_loss])
# How many assignments ago the writer was given the job; most are the one that has it now.
ago = st.sampled_from([0, 0, 0, 0, 1, 2, -1])
# Which canvas, from the next one on.
offsets = st.sampled_from([0, 0, 0, -1, 1])


class Histories(History):
    """What can happen, at any moment and by anybody."""

    # What callers and routers do.

    @rule(priorities=st.lists(st.sampled_from(Priority), min_size=1, max_size=4), router=routers, tenant=tenants)
    def submit(self, priorities: list[Priority], router: str, tenant: str) -> None:
        for priority in priorities[: MOST_JOBS - len(self.canvases)]:
            self.submit_one(priority, router, tenant)

    @rule(one=limits, two=limits, queued=limits)
    def change_quotas(self, one: int | None, two: int | None, queued: int | None) -> None:
        """Higher, lower, gone and back, while jobs run and wait."""
        running = {name: limit for name, limit in (("one", one), ("two", two)) if limit is not None}
        self.bounds = replace(self.bounds, running=running, queued={} if queued is None else {"two": 2 + queued})
        self.run(self.store.set_quotas(rows_of(self.bounds)))
        self.look_again()

    @rule(number=jobs, router=routers)
    def submit_again(self, number: int, router: str) -> None:
        job = self.pick(number)
        tenant = self.seen.records[job].tenant
        created, placement = self.run(self.store.submit(new_job(job, router=router, tenant=tenant)))
        assert not created
        assert (placement is not None) == (job in self.seen.running)
        self.look_again()

    @rule(number=jobs, how=st.sampled_from(["cancel", "fail", "failed by its replica", "finish"]), ago=ago)
    def end(self, number: int, how: str, ago: int) -> None:
        job = self.pick(number)
        epoch = self.epoch(job, ago)
        if how == "cancel":
            self.cancel(job)
        elif how == "fail":
            self.attempt(job, Action.fail, self.store.fail(job, BROKEN), epoch=None)
        elif how == "finish":
            self.attempt(job, Action.finish, self.store.finish(job, epoch, FinishReason.LENGTH), epoch=epoch)
        else:
            self.attempt(job, Action.fail, self.store.fail(job, BROKEN, epoch=epoch), epoch=epoch)

    def cancel(self, job: str) -> None:
        before = self.seen.records[job].state
        answer = self.run(self.store.cancel(job))
        self.look_again()
        assert answer.state is self.seen.records[job].state is TRANSITIONS.get((before, Action.cancel), before)

    @rule(number=jobs, ago=ago, end=ends)
    def reap(self, number: int, ago: int, end: AttemptEnd) -> None:
        job = self.pick(number)
        self.take_back(job, self.epoch(job, ago), end)

    def take_back(self, job: str, epoch: int, end: AttemptEnd) -> None:
        before = self.seen.records[job]
        if self.attempt(job, Action.reap, self.store.reap(job, epoch, end, "gone"), epoch=epoch):
            self.check_requeued(before, end, "gone")
            assert not self.seen.takes_jobs(before.replica)

    @rule(replica=replicas, end=losses)
    def kill_and_restart(self, replica: str, end: AttemptEnd) -> None:
        """The owners lose all that ran there, one by one; then a new process has the same place."""
        for job, record in self.seen.active(replica).items():
            self.take_back(job, record.epoch, end)
        self.beat_of_a_replica(replica)

    @rule()
    def assign(self) -> None:
        assert self.run(self.store.assign()) == 0  # a freed slot never waits for somebody to look
        self.look_again()

    @rule()
    def wait_long(self) -> None:
        before = {entry.job_id: entry for entry in self.seen.waiting}
        self.run(self.redis.zadd(WAITING, dict.fromkeys(["", *before], 1), xx=True))
        kept = any(self.seen.records[job].losses == BOUNDS.max_attempts - 1 for job in before)
        placed = self.run(self.store.assign())
        # A new order brings nobody a slot, unless one was kept for a job that is further back now.
        assert placed == 0 or kept
        self.look_again()
        after = {entry.job_id: entry for entry in self.seen.waiting}
        assert after == {job: entry.aged() for job, entry in before.items() if job in after}
        assert len(after) == len(before) - placed
        assert all(entry.level <= OLDEST for entry in self.seen.waiting)

    @rule(router=routers)
    def look(self, router: str) -> None:
        before = self.seen
        adopted = self.run(self.store.look(router))
        self.look_again()
        for record in before.running.values():
            if self.believed and not before.is_live("replicas", record.replica):
                self.check_requeued(record, AttemptEnd.LEASE_EXPIRED, "the replica was not heard of for a whole lease")
        gone = {
            name for name, end_ms in before.scores("routers").items() if self.is_believed_gone(before, name, end_ms)
        }
        orphans = {job for job, record in before.alive.items() if record.router in gone - {router}}
        assert set(adopted) - set(self.seen.alive) == set()
        assert orphans & set(self.seen.alive) == set(adopted)
        assert all(self.seen.records[job].router == router for job in adopted)

    def is_believed_gone(self, before: Observation, router: str, end_ms: float) -> bool:
        return end_ms == 0 or (self.believed and not before.is_live("routers", router))

    @rule(router=routers)
    def beat_of_a_router(self, router: str) -> None:
        owned = self.run(self.store.heartbeat_router(router))
        self.look_again()
        assert owned == {job for job, record in self.seen.alive.items() if record.router == router}
        assert self.seen.is_live("routers", router)

    @rule(router=routers)
    def crash_of_a_router(self, router: str) -> None:
        self.run(self.redis.zadd(KEYS.routers, {router: 1}, xx=True))
        self.look_again()

    @rule(router=routers)
    def leave_of_a_router(self, router: str) -> None:
        self.run(self.store.leave_router(router))
        self.look_again()
        assert not self.seen.is_live("routers", router)

    # What replicas do, also those that have lost the job and do not know it.

    @rule(number=jobs, ago=ago, offset=offsets, last=st.sampled_from([False, False, True]))
    def commit(self, number: int, ago: int, offset: int, last: bool) -> None:
        """The next canvas, the one before it again, or one too far, by anybody."""
        job = self.pick(number)
        stored, epoch = self.canvases[job], self.epoch(job, ago)
        index = max(0, len(stored) + offset)
        # The one before it can be repeated under the epoch that wrote it only: the bytes say which that was.
        canvas = b"%s %d %d" % (job.encode(), index, epoch)
        repeated = index < len(stored) and stored[index] == canvas
        fits = index == len(stored) or (repeated and (not last or index == len(stored) - 1))
        finish = FinishReason.EOS if last else None
        write = self.store.commit(job, epoch, index, canvas, tokens=1, denoising_steps=1, finish=finish)
        action = Action.finish if last else Action.commit
        if self.attempt(job, action, write, epoch=epoch, fits=fits, repeated=repeated) and not repeated:
            stored.append(canvas)
            self.saved.pop(job, None)
            assert self.seen.records[job].losses == 0

    @rule(number=jobs, ago=ago, offset=offsets, step=st.integers(0, 9))
    def save_checkpoint(self, number: int, ago: int, offset: int, step: int) -> None:
        job = self.pick(number)
        epoch, checkpoint = self.epoch(job, ago), self.checkpoint(job, offset, step)
        write = self.store.save_checkpoint(job, epoch, checkpoint)
        if self.attempt(job, Action.checkpoint, write, epoch=epoch):
            self.keep(job, checkpoint)

    @rule(number=jobs, ago=ago, end=ends, offset=st.none() | offsets, hand_over=st.booleans())
    def release(self, number: int, ago: int, end: AttemptEnd, offset: int | None, hand_over: bool) -> None:
        job = self.pick(number)
        self.give_back(job, self.epoch(job, ago), end, offset=offset, hand_over=hand_over)

    def give_back(
        self, job: str, epoch: int, end: AttemptEnd, *, offset: int | None = None, hand_over: bool = False
    ) -> None:
        before, heirs = self.seen.records[job], self.live_routers() - {self.seen.records[job].router}
        saved = None if offset is None else self.checkpoint(job, offset, 5)
        write = self.store.release(job, epoch, end, "stopped", checkpoint=saved, hand_over=hand_over)
        if not self.attempt(job, Action.release, write, epoch=epoch):
            return
        self.check_requeued(before, end, "stopped")
        if saved:
            self.keep(job, saved)
        if job in self.seen.alive:
            handed = hand_over and bool(heirs)
            assert self.seen.records[job].router in (heirs if handed else {before.router})

    @precondition(lambda self: self.seen.members("marked"))
    @rule(most=st.integers(1, 3))
    def obey_marks(self, most: int) -> None:
        for job in sorted(self.seen.members("marked"))[:most]:
            before = self.seen.records[job]
            self.give_back(job, before.epoch, AttemptEnd.PREEMPTED, offset=0)
            assert self.seen.records[job].preemptions == before.preemptions + 1

    @rule(replica=replicas)
    def beat_of_a_replica(self, replica: str) -> None:
        drains = b"draining" in self.seen.keys["replica"].get(replica, {})
        orders = self.run(self.store.heartbeat_replica(hello(replica, slots=REPLICAS[replica])))
        self.look_again()
        marked = self.seen.members("marked")
        assigned = {order.job_id: (order.epoch, order.preempt) for order in orders.assigned}
        assert assigned == {job: (r.epoch, job in marked) for job, r in self.seen.active(replica).items()}
        assert orders.draining == drains
        row = self.seen.keys["replica"][replica]
        assert self.seen.takes_jobs(replica) == (not drains and b"suspect" not in row)

    @rule(replica=replicas)
    def crash_of_a_replica(self, replica: str) -> None:
        self.run(self.redis.zadd(KEYS.replicas, {replica: 1}, xx=True))
        # No script ran: if it had a job on its last chance, the next look finds that another one may run apart now.
        self.run(self.store.assign())
        self.look_again()

    @rule(replica=replicas)
    def drain(self, replica: str) -> None:
        known = replica in self.seen.keys["replica"]
        error = self.refused(self.store.drain_replica(replica))
        assert isinstance(error, ReplicaNotFound) == (not known)
        self.run(self.store.assign())
        self.look_again()

    @rule(replica=replicas, end=ends)
    def leave_of_a_replica(self, replica: str, end: AttemptEnd) -> None:
        before = self.seen.active(replica)
        assert self.run(self.store.leave_replica(replica, end, "left")) == len(before)
        self.look_again()
        assert replica not in self.seen.keys["replica"]
        for record in before.values():
            self.check_requeued(record, end, "left")

    # What befalls Redis.

    @rule()
    def redis_was_away(self) -> None:
        self.run(self.redis.hset(PULSE, "heard_ms", 1))
        self.believed = False

    @precondition(lambda self: not self.believed)
    @rule()
    def everybody_had_time_to_come_back(self) -> None:
        self.look_again()
        self.run(self.redis.hset(PULSE, mapping={"heard_ms": self.seen.now_ms, "grace_ms": 1}))
        self.believed = True


Event = Callable[[Histories, Random], None]
REPLICA_NAMES, ROUTER_NAMES, ENDS = list(REPLICAS), ["router-1", "router-2", "router-3"], list(AttemptEnd)


def _number(random: Random) -> int:
    return random.randrange(256)


def _ago(random: Random) -> int:
    return random.choice([0, 0, 0, 0, 0, 0, 1, 2, -1])


def _offset(random: Random) -> int:
    return random.choice([0, 0, 0, 0, -1, 1])


def _priorities(random: Random) -> list[Priority]:
    return random.choices(list(Priority), k=random.randint(1, 3))


# How often, and what: everything that the rules can do, in a mix that keeps the slots busy.
EVENTS: list[tuple[int, Event]] = [
    (
        12,
        lambda h, r: h.submit(_priorities(r), r.choice(ROUTER_NAMES), r.choice(TENANTS)),
    ),
    (4, lambda h, r: h.change_quotas(*(r.choice([1, 2, 3, None]) for _ in range(3)))),
    (2, lambda h, r: h.submit_again(_number(r), r.choice(ROUTER_NAMES))),
    (6, lambda h, r: h.end(_number(r), r.choice(["cancel", "fail", "failed by its replica", "finish"]), _ago(r))),
    (24, lambda h, r: h.commit(_number(r), _ago(r), _offset(r), r.random() < 0.2)),
    (6, lambda h, r: h.save_checkpoint(_number(r), _ago(r), _offset(r), r.randrange(9))),
    (10, lambda h, r: h.release(_number(r), _ago(r), r.choice(ENDS), r.choice([None, 0, 0, 1]), r.random() < 0.5)),
    (6, lambda h, r: h.reap(_number(r), _ago(r), r.choice(ENDS))),
    (8, lambda h, r: h.kill_and_restart(r.choice(REPLICA_NAMES), AttemptEnd.REPLICA_LOST)),
    (8, lambda h, r: (h.seen.members("marked") and h.obey_marks(r.randint(1, 3))) or None),
    (16, lambda h, r: h.beat_of_a_replica(r.choice(REPLICA_NAMES))),
    (5, lambda h, r: h.crash_of_a_replica(r.choice(REPLICA_NAMES))),
    (2, lambda h, r: h.drain(r.choice(REPLICA_NAMES))),
    (3, lambda h, r: h.leave_of_a_replica(r.choice(REPLICA_NAMES), r.choice(ENDS))),
    (12, lambda h, r: h.look(r.choice(ROUTER_NAMES))),
    (8, lambda h, r: h.beat_of_a_router(r.choice(ROUTER_NAMES))),
    (3, lambda h, r: h.crash_of_a_router(r.choice(ROUTER_NAMES))),
    (2, lambda h, r: h.leave_of_a_router(r.choice(ROUTER_NAMES))),
    (2, lambda h, r: h.assign()),
    (3, lambda h, r: h.wait_long()),
    (2, lambda h, r: h.redis_was_away()),
    (6, lambda h, r: h.everybody_had_time_to_come_back()),
]


def storm(url: str, seed: int, steps: int) -> None:
    """A history without hypothesis: it cannot be made shorter when it fails, but no step is idle."""
    random, history = Random(seed), Histories()
    history.url = database(url)
    weights, events = zip(*EVENTS, strict=True)
    try:
        history.open(random.choices(list(Priority), k=8))
        for _ in range(steps):
            random.choices(events, weights)[0](history, random)
            history.redis_agrees_with_the_model_and_leaks_nothing()
    finally:
        history.teardown()


def database(url: str) -> str:
    """Where nothing else is: every key in it belongs to the history."""
    return url.rpartition("/")[0] + "/9"


def play(url: str, *, examples: int, steps: int, seeded: bool) -> None:
    class Served(Histories):
        pass

    Served.url = database(url)
    bounds = settings(
        deadline=None,
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
        derandomize=seeded,
        database=None,
    )
    run_state_machine_as_test(Served, settings=bounds)


def test_no_history_leaks_a_slot_loses_a_job_or_moves_an_ended_one(redis_server: RedisServer) -> None:
    play(redis_server.url, examples=15, steps=40, seeded=True)


@pytest.mark.parametrize("seed", range(8))
def test_no_storm_does_either(redis_server: RedisServer, seed: int) -> None:
    storm(redis_server.url, seed, steps=150)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_long_history_does_either(redis_server: RedisServer) -> None:
    play(redis_server.url, examples=500, steps=100, seeded=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_long_storm_does_either(redis_server: RedisServer) -> None:
    for seed in range(100, 200):
        storm(redis_server.url, seed, steps=300)
