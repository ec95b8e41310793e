"""Everything that Redis holds of one namespace at one moment, and what must be true of it at every moment."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from cluster.core import Priority
from cluster.jobs.keys import Keys
from cluster.jobs.records import Checkpoint, JobRecord, parse_record
from cluster.jobs.states import JobState
from cluster.policy.ordering import OLDEST, QueueEntry, parse_member, queue_member
from cluster.policy.preemption import Runner, choose_victims, victim_member

# How a key of each kind is read.
_READ = {
    "hash": ("job", "checkpoint", "replica", "running", "apart", "pulse", "quotas", "bucket"),
    "zset": (
        *("queue", "waiting", "victims", "replicas", "routers", "jobs", "expiring"),
        *("held", "held_of", "admitted"),
    ),
    "set": ("owned", "marked", "fresh", "running_of"),
    "stream": ("canvases",),
    "string": ("seq", "schema"),
}
_TYPES = {kind: kind_type for kind_type, kinds in _READ.items() for kind in kinds}


@dataclass(frozen=True)
class Bounds:
    """The limits that the store under test was opened with."""

    max_attempts: int = 3
    max_preemptions: int = 2
    # By tenant; one that is not named has no limit.
    running: dict[str, int] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """All keys, as kind -> id -> value; the id is "" for the kinds of which there is one key."""

    now_ms: int
    keys: dict[str, dict[str, Any]]

    @cached_property
    def records(self) -> dict[str, JobRecord]:
        rows = self.keys["job"].items()
        return {job: parse_record(job, {k.decode(): v for k, v in row.items()}, self.now_ms) for job, row in rows}

    @cached_property
    def alive(self) -> dict[str, JobRecord]:
        """The jobs that have not ended."""
        return {job: record for job, record in self.records.items() if not record.state.terminal}

    @cached_property
    def running(self) -> dict[str, JobRecord]:
        return {job: record for job, record in self.records.items() if record.state is JobState.RUNNING}

    @cached_property
    def queue(self) -> list[QueueEntry]:
        """Its head first; those that a quota holds are not in it."""
        return [parse_member(member) for member in sorted(self.scores("queue"))]

    @cached_property
    def waiting(self) -> list[QueueEntry]:
        """The queue, and what quotas hold."""
        members = [member for tenant in self.keys["held_of"] for member in self.scores("held_of", tenant)]
        return [*self.queue, *map(parse_member, sorted(members))]

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        return {job: _checkpoint(row) for job, row in self.keys["checkpoint"].items()}

    def scores(self, kind: str, of: str = "") -> dict[str, float]:
        return {member.decode(): score for member, score in self.keys[kind].get(of, ())}

    def members(self, kind: str, of: str = "") -> set[str]:
        return {member.decode() for member in self.keys[kind].get(of, ())}

    def texts(self, kind: str, of: str = "") -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.keys[kind].get(of, {}).items()}

    def canvases(self, job: str) -> list[bytes]:
        return [fields[b"c"] for _, fields in self.keys["canvases"].get(job, ())]

    def last_epoch(self, job: str) -> int | None:
        """Under which the last canvas was committed."""
        entries = self.keys["canvases"].get(job, ())
        return int(entries[-1][0].split(b"-")[1]) if entries else None

    def is_live(self, kind: str, process: str) -> bool:
        return self.scores(kind).get(process, 0) > self.now_ms

    def takes_jobs(self, replica: str) -> bool:
        row = self.keys["replica"].get(replica, {})
        return self.is_live("replicas", replica) and b"slots" in row and not {b"suspect", b"draining"} & set(row)

    def active(self, replica: str) -> dict[str, JobRecord]:
        return {job: record for job, record in self.running.items() if record.replica == replica}


async def observe(redis: Redis, namespace: str) -> Observation:
    """Of a database in which nothing else is. Fails on a key that nobody documented."""
    base = f"{Keys(namespace).base}:"
    names = [name.decode() for name in cast("list[bytes]", await redis.keys("*"))]
    pipeline = redis.pipeline(transaction=True)
    pipeline.time()
    split = [name.removeprefix(base).partition(":") for name in names]
    for name, (kind, _, _) in zip(names, split, strict=True):
        _ask(pipeline, _TYPES[kind], name)
    (seconds, micros), *values = await pipeline.execute()
    keys: dict[str, dict[str, Any]] = defaultdict(dict)
    for (kind, _, of), value in zip(split, values, strict=True):
        keys[kind][of] = value
    return Observation(seconds * 1000 + micros // 1000, keys)


def _ask(pipeline: Pipeline, key_type: str, name: str) -> None:
    match key_type:
        case "hash":
            pipeline.hgetall(name)
        case "zset":
            pipeline.zrange(name, 0, -1, withscores=True)
        case "set":
            pipeline.smembers(name)
        case "stream":
            pipeline.xrange(name)
        case _:
            pipeline.get(name)


def _checkpoint(row: dict[bytes, bytes]) -> Checkpoint:
    return Checkpoint(row[b"version"].decode(), int(row[b"canvas_index"]), int(row[b"step"]), row[b"payload"])


def check(seen: Observation, bounds: Bounds) -> None:
    """Every invariant of a namespace."""
    each_job_is_in_the_queue_or_on_a_slot_or_has_ended(seen)
    slots_hold_exactly_what_runs(seen)
    each_living_job_has_one_owner(seen)
    quotas_hold_what_is_too_much_and_nothing_else(seen, bounds)
    only_running_jobs_give_way(seen, bounds)
    canvases_are_whole_and_checkpoints_of_the_next_one(seen)
    losses_are_bounded_and_last_chances_run_apart(seen, bounds)
    nobody_waits_in_vain(seen, bounds)
    the_urgent_have_their_marks(seen, bounds)
    ended_jobs_expire(seen)


def each_job_is_in_the_queue_or_on_a_slot_or_has_ended(seen: Observation) -> None:
    queued = {job: record for job, record in seen.records.items() if record.state is JobState.QUEUED}
    assert sorted(entry.job_id for entry in seen.waiting) == sorted(queued) == sorted(seen.scores("waiting"))
    for entry in seen.waiting:
        record = queued[entry.job_id]
        assert record.priority <= entry.level <= OLDEST
        assert entry.deadline_ms == record.deadline_ms
        assert queue_member(entry).encode() == seen.keys["job"][entry.job_id][b"member"]
    indexed = [(tenant, job) for tenant in seen.keys["jobs"] for job in seen.scores("jobs", tenant)]
    assert sorted(indexed) == sorted((job.rpartition("/")[0], job) for job in seen.records)


def slots_hold_exactly_what_runs(seen: Observation) -> None:
    held = {}
    for replica in seen.keys["running"]:
        for job, value in seen.texts("running", replica).items():
            assert job not in held
            held[job] = (replica, value)
    marked = seen.members("marked")
    assert held == {
        job: (record.replica, f"{record.epoch} preempt" if job in marked else f"{record.epoch}")
        for job, record in seen.running.items()
    }
    for replica, row in seen.keys["replica"].items():
        assert len(seen.active(replica)) <= int(row[b"slots"])
    assert set(seen.keys["running"]) <= set(seen.keys["replica"]) == set(seen.scores("replicas"))


def each_living_job_has_one_owner(seen: Observation) -> None:
    owned = [(router, job) for router in seen.keys["owned"] for job in seen.members("owned", router)]
    assert sorted(owned) == sorted((record.router, job) for job, record in seen.alive.items())
    assert set(seen.keys["owned"]) <= set(seen.scores("routers"))


def quotas_hold_what_is_too_much_and_nothing_else(seen: Observation, bounds: Bounds) -> None:
    counted = {job: record for job, record in seen.alive.items() if b"counted" in seen.keys["job"][job]}
    runs = {(tenant, job) for tenant in seen.keys["running_of"] for job in seen.members("running_of", tenant)}
    assert runs == {(r.tenant, job) for job, r in counted.items() if r.state is JobState.RUNNING}
    waits = {pair for kind in ("admitted", "held_of") for pair in _by_tenant(seen, kind)}
    assert waits == {(r.tenant, job) for job, r in counted.items() if r.state is JobState.QUEUED}
    held = {job for _, job in _by_tenant(seen, "held_of")}
    assert seen.scores("held") == {job: float(seen.alive[job].deadline_ms or 2**53 - 1) for job in held}
    for tenant in {record.tenant for record in counted.values()}:
        _one_tenant(seen, tenant, bounds.running.get(tenant))


def _one_tenant(seen: Observation, tenant: str, limit: int | None) -> None:
    """Below its limit nothing of a tenant is held; beyond it nothing is in the queue; in order in any case."""
    running = len(seen.members("running_of", tenant))
    admitted, held = set(seen.scores("admitted", tenant)), set(seen.scores("held_of", tenant))
    queue = set(seen.scores("queue"))
    assert admitted <= queue
    assert not held & queue
    if held:
        assert limit is not None
        assert running + len(admitted) >= limit
    if admitted and limit is not None:
        assert running + len(admitted) <= limit
    if admitted and held:
        assert max(admitted) < min(held)


def _by_tenant(seen: Observation, kind: str) -> set[tuple[str, str]]:
    return {(tenant, parse_member(m).job_id) for tenant in seen.keys[kind] for m in seen.scores(kind, tenant)}


def only_running_jobs_give_way(seen: Observation, bounds: Bounds) -> None:
    marked = seen.members("marked")
    assert marked <= set(seen.running)
    may = {job for job, r in seen.running.items() if r.preemptions < bounds.max_preemptions and job not in marked}
    assert set(seen.scores("victims")) == {victim_member(runner) for runner in _runners(seen, may)}


def _runners(seen: Observation, jobs: set[str]) -> list[Runner]:
    found = []
    for job in jobs:
        record, victim = seen.records[job], seen.keys["job"][job][b"victim"].decode()
        priority, turn, job_id = victim.split(":", 2)
        assert (int(priority), job_id) == (record.priority, job)
        found.append(Runner(job, record.priority, 2**53 - 1 - int(turn), record.preemptions))
    return found


def canvases_are_whole_and_checkpoints_of_the_next_one(seen: Observation) -> None:
    for job, record in seen.records.items():
        assert len(seen.canvases(job)) == record.canvases
    for job, checkpoint in seen.checkpoints.items():
        assert checkpoint.canvas_index == seen.alive[job].canvases
    assert set(seen.keys["canvases"]) <= set(seen.records)


def losses_are_bounded_and_last_chances_run_apart(seen: Observation, bounds: Bounds) -> None:
    assert all(record.losses < bounds.max_attempts for record in seen.alive.values())
    last = {job: r.replica for job, r in seen.running.items() if r.losses == bounds.max_attempts - 1}
    assert seen.texts("apart") == last
    fresh = {job: r.replica for job, r in seen.running.items() if seen.last_epoch(job) != r.epoch}
    assert fresh == {job: replica for replica in seen.keys["fresh"] for job in seen.members("fresh", replica)}
    for job, replica in last.items():
        assert seen.members("fresh", replica) == {job}


def nobody_waits_in_vain(seen: Observation, bounds: Bounds) -> None:
    """Half of the replicas, but one at least, may be kept for jobs on their last chance."""
    takers = [replica for replica in seen.keys["replica"] if seen.takes_jobs(replica)]
    apart = set(seen.texts("apart").values()) & set(takers)
    free = [r for r in set(takers) - apart if len(seen.active(r)) < int(seen.keys["replica"][r][b"slots"])]
    may_keep = max(1, len(takers) // 2) - len(apart)
    waiting = [seen.records[entry.job_id].losses for entry in seen.queue]
    last_chances = waiting.count(bounds.max_attempts - 1)
    if last_chances and may_keep > 0:
        assert all(seen.members("fresh", replica) for replica in free)
    if last_chances < len(waiting):
        assert len(free) <= max(0, min(last_chances, may_keep))


def the_urgent_have_their_marks(seen: Observation, bounds: Bounds) -> None:
    """But for those on their last chance, which need more than a slot."""
    marked, apart = seen.members("marked"), set(seen.texts("apart").values())
    takers = {replica for replica in seen.keys["replica"] if seen.takes_jobs(replica)} - apart
    candidates = {job for job, r in seen.running.items() if job not in marked and r.replica in takers}
    waiting = [seen.records[entry.job_id] for entry in seen.queue]
    last = bounds.max_attempts - 1
    priorities = [record.priority if record.losses < last else Priority.BATCH for record in waiting]
    missing = choose_victims(
        priorities, _runners(seen, candidates), marks=len(marked), max_preemptions=bounds.max_preemptions
    )
    assert missing == []


def ended_jobs_expire(seen: Observation) -> None:
    assert set(seen.scores("expiring")) == set(seen.records) - set(seen.alive)
