"""What readers see when a router dies, leaves, or loses Redis: the same answer, every canvas once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from cluster.client import Committed, Draft, EaselClient, Event, Finished
from cluster.core import Priority
from cluster.errors import Unavailable
from cluster.jobs.connection import connect as connect_redis
from cluster.jobs.store import JobStore
from cluster.redis_server import RedisServer, free_port
from cluster.rpc.prompts import build_request
from tests.e2e.conftest import Connect, Stack, Start, until

SHORT_LEASE = {"lease_ms": 600, "heartbeat_ms": 100}


async def canvases_of(events: AsyncIterator[Event]) -> tuple[list[int], list[int], Finished | None]:
    """Indices, tokens and the end of an answer's events."""
    indices: list[int] = []
    tokens: list[int] = []
    finished = None
    async for event in events:
        if isinstance(event, Committed):
            indices.append(event.canvas_index)
            tokens.extend(event.token_ids)
        elif isinstance(event, Finished):
            finished = event
    return indices, tokens, finished


async def undisturbed(client: EaselClient, seed: int, *, max_new_tokens: int = 128) -> list[int]:
    answer = await client.generate(tokens=[2, 3], seed=seed, max_new_tokens=max_new_tokens)
    return list(answer.token_ids)


async def first_canvas_is_there(stack: Stack, client: EaselClient, job_id: str) -> None:
    async def is_there() -> bool:
        return (await client.get(job_id)).usage.canvases >= 1

    await until(is_there)


async def test_a_job_of_a_dead_router_is_finished_by_another_one(start: Start, connect: Connect) -> None:
    stack = await start(replicas=2, state=SHORT_LEASE, step_time_ms=20.0, steps_per_canvas=5)
    await stack.add_router("router-1")
    first, second = connect(stack), connect(stack, "router-1")
    expected = await undisturbed(second, 1)
    job = await first.submit(tokens=[2, 3], seed=1, max_new_tokens=128)
    await first_canvas_is_there(stack, second, job.job_id)
    await stack.crash_router("router-0")
    indices, tokens, finished = await canvases_of(second.watch(job.job_id))
    assert (indices, tokens) == ([0, 1, 2, 3], expected)
    assert finished is not None


async def test_drafts_come_again_once_the_router_that_is_asked_has_charge_of_the_job(
    start: Start, connect: Connect
) -> None:
    stack = await start(replicas=2, state=SHORT_LEASE, step_time_ms=20.0, steps_per_canvas=20)
    await stack.add_router("router-1")
    client = connect(stack, "router-0", "router-1")
    seen: list[Event] = []

    async def read() -> None:
        async for event in client.stream(tokens=[2, 3], seed=1, max_new_tokens=128, drafts=True):
            seen.append(event)

    reading = asyncio.create_task(read())
    await until(lambda: any(isinstance(event, Committed) for event in seen))
    await stack.crash_router("router-0")
    await reading
    assert [event.canvas_index for event in seen if isinstance(event, Committed)] == [0, 1, 2, 3]
    assert {event.canvas_index for event in seen if isinstance(event, Draft)} == {0, 1, 2, 3}


async def test_jobs_that_wait_outlive_their_router(start: Start, connect: Connect) -> None:
    stack = await start(state=SHORT_LEASE, slots=1, step_time_ms=20.0, steps_per_canvas=10)
    await stack.add_router("router-1")
    first, second = connect(stack), connect(stack, "router-1")
    ids = [(await first.submit(tokens=[2, 3], seed=seed, max_new_tokens=64)).job_id for seed in range(3)]
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    await stack.crash_router("router-0")
    for seed, job_id in enumerate(ids):
        _, tokens, _ = await canvases_of(second.watch(job_id))
        assert tokens == await undisturbed(second, seed, max_new_tokens=64)


async def test_a_client_goes_on_by_itself_when_its_router_dies(start: Start, connect: Connect) -> None:
    stack = await start(replicas=2, state=SHORT_LEASE, step_time_ms=20.0, steps_per_canvas=5)
    await stack.add_router("router-1")
    client, other = connect(stack, "router-0", "router-1"), connect(stack, "router-1")
    expected = await undisturbed(other, 1)
    reading = asyncio.create_task(canvases_of(client.stream(tokens=[2, 3], seed=1, max_new_tokens=128)))
    asking = asyncio.create_task(client.generate(tokens=[2, 3], seed=1, max_new_tokens=128))
    await until(lambda: sum(engine.stats().canvases for engine in stack.engines.values()) >= 6)
    await stack.crash_router("router-0")
    indices, tokens, finished = await reading
    assert (indices, tokens) == ([0, 1, 2, 3], expected)
    assert finished is not None
    assert list((await asking).token_ids) == expected


async def test_a_router_that_leaves_hands_its_jobs_over_without_redoing_a_step(start: Start, connect: Connect) -> None:
    stack = await start(slots=4, step_time_ms=20.0, steps_per_canvas=20)
    await stack.add_router("router-1")
    client, other = connect(stack, "router-0", "router-1"), connect(stack, "router-1")
    expected = await undisturbed(other, 1, max_new_tokens=64)
    engine = stack.engines["denoiser-0"]
    steps = engine.stats().canvas_steps
    reading = asyncio.create_task(canvases_of(client.stream(tokens=[2, 3], seed=1, max_new_tokens=64)))
    await until(lambda: engine.stats().canvas_steps >= steps + 5)
    await stack.routers.pop("router-0").close()
    indices, tokens, finished = await reading
    assert (indices, tokens) == ([0, 1], expected)
    assert engine.stats().canvas_steps == steps + 40
    assert finished is not None
    assert finished.usage.attempts == 2


async def test_a_new_router_takes_the_port_over_while_the_old_one_leaves(start: Start, connect: Connect) -> None:
    stack = await start(replicas=0)
    await stack.add_replica("denoiser-0", step_time_ms=20.0, steps_per_canvas=10)
    port = free_port()
    await stack.add_router("old", port=port)
    client = connect(stack, "old")
    reading = [
        asyncio.create_task(canvases_of(client.stream(tokens=[2, 3], seed=n, max_new_tokens=64))) for n in range(2)
    ]
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 2)
    await stack.add_router("new", port=port)
    await stack.routers.pop("old").close()
    for seed, task in enumerate(reading):
        indices, tokens, _ = await task
        assert indices == [0, 1]
        assert tokens == await undisturbed(client, seed, max_new_tokens=64)
    assert "new" in (await client.status()).routers


async def test_a_job_whose_submit_was_answered_to_nobody_is_taken_up(start: Start, connect: Connect) -> None:
    stack = await start()
    client = connect(stack)
    store = JobStore.of(connect_redis(stack.settings.state.url), stack.settings.state)
    intake = stack.routers["router-0"]._intake
    request = build_request(None, [2, 3], {"seed": 1, "max_new_tokens": 64, "request_id": "unheard"})
    await store.submit(intake._new_job(intake._parse(request, None)))
    indices, tokens, _ = await canvases_of(client.watch("unheard"))
    assert indices == [0, 1]
    assert tokens == await undisturbed(client, 1, max_new_tokens=64)
    await store.close()


async def test_canvases_go_on_while_redis_is_away_and_nothing_is_lost(
    start: Start, connect: Connect, own_redis: RedisServer
) -> None:
    stack = await start(
        replicas=2, state={"url": own_redis.url, "timeout_s": 0.3} | SHORT_LEASE, step_time_ms=20.0, steps_per_canvas=5
    )
    client = connect(stack)
    expected = await undisturbed(client, 1)
    steps = sum(engine.stats().canvas_steps for engine in stack.engines.values())
    reading = asyncio.create_task(canvases_of(client.stream(tokens=[2, 3], seed=1, max_new_tokens=128)))
    await until(lambda: sum(engine.stats().canvas_steps for engine in stack.engines.values()) >= steps + 3)
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable) as caught:
            async with EaselClient(stack.addresses["router-0"], retries=0, patience_s=0) as impatient:
                await impatient.submit(tokens=[2], max_new_tokens=32)
        # All four canvases are denoised meanwhile: what is denoised once more would show in the count below.
        await until(lambda: sum(engine.stats().canvas_steps for engine in stack.engines.values()) == steps + 20)
        await asyncio.sleep(1.0)
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    assert caught.value.retry_after_ms is not None
    indices, tokens, finished = await reading
    assert (indices, tokens) == ([0, 1, 2, 3], expected)
    assert finished is not None
    assert finished.usage.attempts == 1
    assert sum(engine.stats().canvas_steps for engine in stack.engines.values()) == steps + 20


async def test_a_redis_that_was_killed_comes_back_with_every_accepted_job(
    start: Start, connect: Connect, own_redis: RedisServer
) -> None:
    stack = await start(
        slots=1, state={"url": own_redis.url, "timeout_s": 0.5} | SHORT_LEASE, step_time_ms=10.0, steps_per_canvas=10
    )
    client = connect(stack)
    ids = [(await client.submit(tokens=[2, 3], seed=seed, max_new_tokens=64)).job_id for seed in range(4)]
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    own_redis.kill()
    await asyncio.sleep(0.5)
    own_redis.restart()
    for seed, job_id in enumerate(ids):
        indices, tokens, _ = await canvases_of(client.watch(job_id))
        assert indices == [0, 1]
        assert tokens == await undisturbed(client, seed, max_new_tokens=64)


async def test_an_urgent_job_takes_the_slot_of_a_batch_job_which_goes_on_later(start: Start, connect: Connect) -> None:
    stack = await start(slots=1, step_time_ms=20.0, steps_per_canvas=20)
    client = connect(stack)
    expected = await undisturbed(client, 1, max_new_tokens=64)
    engine = stack.engines["denoiser-0"]
    steps = engine.stats().canvas_steps
    batch = asyncio.create_task(
        client.generate(tokens=[2, 3], seed=1, max_new_tokens=64, priority=Priority.BATCH, request_id="batch")
    )
    await until(lambda: engine.stats().canvas_steps >= steps + 5)
    urgent = await client.generate(tokens=[2, 3], seed=2, max_new_tokens=32, priority=Priority.URGENT)
    assert not batch.done()
    done = await batch
    assert list(done.token_ids) == expected
    assert (done.usage.preemptions, done.usage.attempts, urgent.usage.preemptions) == (1, 2, 0)
    assert [row.reason for row in (await client.get("batch")).history] == ["PREEMPTED"]
    assert engine.stats().canvas_steps == steps + 40 + 20
