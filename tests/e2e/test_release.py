"""What a replica does with its jobs when it cannot go on: the same tokens elsewhere, and no denoising step twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
import pytest_asyncio

from cluster.checkpoint import read_checkpoint
from cluster.client import Answer, EaselClient
from cluster.core import Priority
from cluster.errors import EaselError, EngineError, JobFailed, Unavailable
from cluster.jobs.connection import connect as connect_redis
from cluster.jobs.keys import Keys
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer
from deployments.engine.api import StepReport
from deployments.engine.fake import FakeEngine
from deployments.replica import Replica
from deployments.tokenizer import Tokenizer
from tests.e2e.conftest import CHECKPOINT, Connect, Stack, Start, until

SLOW = {"slots": 1, "steps_per_canvas": 30, "step_time_ms": 5.0}
PROMPT = [2, 3]
BOUND_S = 30.0


class HangingEngine(FakeEngine):
    """Step number `hang_at_step` does not end before the test says so."""

    def __init__(self, hang_at_step: int) -> None:
        super().__init__(read_checkpoint(CHECKPOINT).card, slots=1, steps_per_canvas=30, step_time_ms=5.0)
        self._hang_at_step = hang_at_step
        self.go_on = threading.Event()

    def step(self) -> StepReport:
        if self.stats().denoising_steps + 1 == self._hang_at_step:
            assert self.go_on.wait(BOUND_S)
        return super().step()


@dataclass
class Watched:
    """A stack, and the store behind it, to look at what became of a job."""

    stack: Stack
    store: JobStore

    async def reasons(self, job_id: str) -> list[str]:
        return [attempt.reason for attempt in (await self.store.get(job_id)).history]

    async def replicas(self) -> set[str]:
        return {row.replica for row in (await self.store.view()).replicas}

    def steps(self) -> int:
        return sum(engine.stats().canvas_steps for engine in self.stack.engines.values())

    def busy(self) -> str:
        """The one replica that has a job."""
        (name,) = [name for name, engine in self.stack.engines.items() if engine.stats().active_jobs]
        return name

    async def in_mid_canvas(self) -> str:
        """Wait until a canvas is well under way; returns where."""
        await until(lambda: self.steps() >= 10)
        return self.busy()

    async def add_replica_with(self, name: str, engine: FakeEngine) -> Replica:
        self.stack.engines[name] = engine
        decode = Tokenizer(CHECKPOINT).decode
        replica = Replica(self.stack.settings, engine, decode, name=name, advertised_host="127.0.0.1")
        await replica.start()
        self.stack.replicas[name] = replica
        return replica


@pytest_asyncio.fixture
async def watch() -> AsyncIterator[list[JobStore]]:
    stores: list[JobStore] = []
    yield stores
    for store in stores:
        await store.close()


def watched(stack: Stack, stores: list[JobStore]) -> Watched:
    store = JobStore.of(connect_redis(stack.settings.state.url), stack.settings.state)
    stores.append(store)
    return Watched(stack, store)


def ask(client: EaselClient, name: str = "job") -> asyncio.Task[Answer]:
    return asyncio.create_task(client.generate(tokens=PROMPT, seed=5, max_new_tokens=64, request_id=name))


async def undisturbed(client: EaselClient) -> tuple[int, ...]:
    return (await ask(client, "undisturbed")).token_ids


async def test_a_drained_replica_gives_its_canvas_to_another_one(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    look = watched(await start(replicas=2, **SLOW), watch)
    client = connect(look.stack)
    call = ask(client)
    first = await look.in_mid_canvas()
    await look.store.drain_replica(first)
    answer = await call
    assert answer.replica != first
    assert await look.reasons("job") == ["DRAINED"]
    assert look.steps() == answer.usage.denoising_steps == 60  # none was made twice
    assert answer.token_ids == await undisturbed(client)
    await until(lambda: _fails(look.stack.replicas[first], Unavailable))
    assert first not in await look.replicas()


async def test_a_replica_that_closes_gives_its_canvases_to_another_one(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    look = watched(await start(replicas=2, **SLOW), watch)
    client = connect(look.stack)
    call = ask(client)
    first = await look.in_mid_canvas()
    await look.stack.replicas.pop(first).close()
    answer = await call
    assert answer.replica != first
    assert await look.reasons("job") == ["DRAINED"]
    assert look.steps() == answer.usage.denoising_steps == 60
    assert answer.token_ids == await undisturbed(client)


async def test_a_job_of_the_last_replica_waits_for_the_next_one(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    look = watched(await start(**SLOW), watch)
    client = connect(look.stack)
    call = ask(client)
    await look.in_mid_canvas()
    await look.stack.replicas.pop("denoiser-0").close()
    assert (await client.get("job")).state == "queued"
    await look.stack.add_replica("denoiser-1", **SLOW)
    assert (await call).replica == "denoiser-1"
    assert look.steps() == 60


async def test_an_engine_that_breaks_loses_its_replica_its_place_and_no_job(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    look = watched(await start(replicas=1, **SLOW, fail_at_step=40), watch)
    client = connect(look.stack)
    call = ask(client)
    await look.in_mid_canvas()
    await look.stack.add_replica("denoiser-1", **SLOW)
    answer = await call
    assert answer.replica == "denoiser-1"
    assert await look.reasons("job") == ["ENGINE"]
    # The first canvas was committed before step 40, and the nine steps of the second one are made again.
    assert look.steps() == 69
    assert answer.usage.denoising_steps == 60
    await asyncio.sleep(0.3)  # some heartbeats: none brings it back
    assert await look.replicas() == {"denoiser-1"}
    assert _fails(look.stack.replicas["denoiser-0"], EngineError)
    assert answer.token_ids == await undisturbed(client)


async def test_a_step_that_hangs_moves_its_jobs(start: Start, connect: Connect, watch: list[JobStore]) -> None:
    look = watched(await start(replicas=0, denoiser={"step_timeout_s": 0.3}), watch)
    client = connect(look.stack)
    engine = HangingEngine(hang_at_step=40)
    replica = await look.add_replica_with("denoiser-0", engine)
    call = ask(client)
    await look.in_mid_canvas()
    await look.stack.add_replica("denoiser-1", **SLOW)
    answer = await call
    assert answer.replica == "denoiser-1"
    assert await look.reasons("job") == ["STEP_HUNG"]
    assert await look.replicas() == {"denoiser-1"}
    assert _fails(replica, EngineError)
    engine.go_on.set()  # the thread comes back to an attempt that is over: it ends
    await until(lambda: not replica._denoiser._steps._thread.is_alive())
    assert answer.token_ids == await undisturbed(client)


async def test_a_replica_whose_step_hangs_can_be_closed(start: Start, watch: list[JobStore], connect: Connect) -> None:
    look = watched(await start(replicas=0, denoiser={"step_timeout_s": 0.3}), watch)
    engine = HangingEngine(hang_at_step=5)
    replica = await look.add_replica_with("denoiser-0", engine)
    call = ask(connect(look.stack))
    await until(lambda: _fails(replica, EngineError))
    async with asyncio.timeout(BOUND_S):
        await look.stack.replicas.pop("denoiser-0").close()
    engine.go_on.set()
    call.cancel()


async def test_a_job_that_breaks_every_engine_fails_with_its_history(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    look = watched(await start(replicas=4, slots=1, fail_at_step=2), watch)
    with pytest.raises(JobFailed, match="3 attempts"):
        await ask(connect(look.stack))
    assert await look.reasons("job") == ["ENGINE"] * 3
    assert len(await look.replicas()) == 1


async def test_an_urgent_job_takes_a_slot_and_the_victim_goes_on_later(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    look = watched(await start(**SLOW), watch)
    client = connect(look.stack)
    call = ask(client)
    await look.in_mid_canvas()
    urgent = await client.generate(tokens=[4], seed=1, max_new_tokens=32, priority=Priority.URGENT)
    assert not call.done()
    assert urgent.usage.attempts == 1
    answer = await call
    assert await look.reasons("job") == ["PREEMPTED"]
    assert (answer.usage.attempts, answer.usage.preemptions) == (2, 1)
    assert look.steps() == 60 + 30
    assert answer.token_ids == await undisturbed(client)


async def test_a_router_that_dies_costs_no_step(start: Start, connect: Connect, watch: list[JobStore]) -> None:
    look = watched(await start(**SLOW), watch)
    await look.stack.add_router("router-1")
    client, other = connect(look.stack), connect(look.stack, "router-1")
    await client.submit(tokens=PROMPT, seed=5, max_new_tokens=64, request_id="job")
    await look.in_mid_canvas()
    await look.stack.crash_router("router-0")
    answer = await ask(other)
    assert await look.reasons("job") == ["ROUTER_LOST"]
    assert look.steps() == 60
    assert answer.token_ids == await undisturbed(other)


async def test_a_crash_costs_the_steps_since_the_last_checkpoint(
    start: Start, connect: Connect, watch: list[JobStore]
) -> None:
    stack = await start(replicas=2, denoiser={"checkpoint_every_steps": 5}, **SLOW)
    look = watched(stack, watch)
    client = connect(stack)
    call = ask(client)

    async def saved() -> bool:
        return (await look.store.checkpoint("job")) is not None

    await until(saved)
    first = look.busy()
    await crash(stack.replicas[first])
    made = stack.engines[first].stats().canvas_steps
    answer = await call
    assert await look.reasons("job") == ["REPLICA_LOST"]
    kept = 60 - stack.engines[answer.replica].stats().canvas_steps
    assert kept % 5 == 0
    assert max(5, made - 10) <= kept <= made  # one checkpoint may have been under way
    assert answer.token_ids == await undisturbed(client)


async def crash(replica: Replica) -> None:
    """As SIGKILL leaves it: its connections break and nothing more is written."""
    replica._denoiser._steps.abandon(EngineError("killed"))
    await replica._heartbeat.close()
    await replica._store.close()
    replica._store.release = _never  # type: ignore[method-assign]  # the dead write nothing
    await replica._server.stop(None)


async def _never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_redis_may_be_away_for_a_while(
    start: Start, connect: Connect, watch: list[JobStore], own_redis: RedisServer
) -> None:
    state = {"url": own_redis.url, "timeout_s": 0.5}
    look = watched(await start(state=state, slots=1, steps_per_canvas=10, step_time_ms=5.0), watch)
    await connect(look.stack).submit(tokens=PROMPT, seed=5, max_new_tokens=96, request_id="job")
    await until(lambda: look.steps() >= 5)
    own_redis.stop()
    await until(lambda: look.stack.engines["denoiser-0"].stats().canvases == 3)  # it went on by itself
    own_redis.start()

    await until(partial(is_done, look.store))
    job = await look.store.get("job")
    assert (job.state, job.canvases, job.attempts, job.history) == ("succeeded", 3, 1, ())
    assert look.steps() == 30


async def test_a_job_outlives_an_outage_that_outlasts_the_patience_of_its_run(
    start: Start, connect: Connect, watch: list[JobStore], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than what a missed ring costs the router: its doorbell may not be back with Redis.
    monkeypatch.setattr("deployments.denoiser.CLAIM_PATIENCE_S", 3.0)
    state = {"url": own_redis.url, "timeout_s": 0.5, "outage_patience_s": 0.5}
    look = watched(await start(state=state, slots=1, steps_per_canvas=10, step_time_ms=5.0), watch)
    await connect(look.stack).submit(tokens=PROMPT, seed=5, max_new_tokens=96, request_id="job")
    await until(lambda: look.steps() >= 5)
    own_redis.stop()
    await until(lambda: not look.stack.replicas["denoiser-0"]._denoiser.running())
    own_redis.start()

    await until(partial(is_done, look.store))
    job = await look.store.get("job")
    assert (job.state, job.canvases, await look.reasons("job")) == ("succeeded", 3, ["UNCLAIMED"])


async def test_a_canvas_that_redis_lost_is_made_again(start: Start, connect: Connect, watch: list[JobStore]) -> None:
    look = watched(await start(slots=1, steps_per_canvas=20, step_time_ms=5.0), watch)
    client = connect(look.stack)
    await client.submit(tokens=PROMPT, seed=5, max_new_tokens=96, request_id="job")
    await until(lambda: look.steps() >= 50)  # two canvases are committed
    redis, keys = connect_redis(look.stack.settings.state.url), Keys(look.stack.settings.state.namespace)
    # As a Redis that comes back without its last writes.
    await redis.delete(keys.canvases("job"))
    await redis.hset(keys.job("job"), mapping={"canvases": 0, "generated_tokens": 0, "denoising_steps": 0})
    await redis.aclose()

    await until(partial(is_done, look.store))
    record = await look.store.get("job")
    assert (record.state, record.canvases, record.denoising_steps) == ("succeeded", 3, 60)
    assert [attempt.reason for attempt in record.history] == ["LOST_WRITES"]


async def is_done(store: JobStore) -> bool:
    """Whether the job has ended; not, while Redis does not answer."""
    with suppress(EaselError):
        return (await store.get("job")).state.terminal
    return False


def _fails(replica: Replica, kind: type[EaselError]) -> bool:
    try:
        replica.check()
    except kind:
        return True
    return False
