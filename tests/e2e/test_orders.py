"""What a client may ask of jobs and replicas that it cannot have, and what it gets when it can."""

from __future__ import annotations

import pytest

from cluster.client import Accepted, EaselClient, Event, Finished
from cluster.errors import InvalidRequest, ReplicaNotFound, TransitionError
from tests.e2e.conftest import Connect, Start, until

SLOW = {"step_time_ms": 20.0, "steps_per_canvas": 200}


async def read(client: EaselClient, job_id: str, from_canvas: int) -> list[Event]:
    return [event async for event in client.watch(job_id, from_canvas)]


async def test_a_job_that_has_ended_cannot_be_cancelled_and_a_cancel_is_safe_to_repeat(
    start: Start, connect: Connect
) -> None:
    client = connect(await start(step_time_ms=20.0))
    answer = await client.generate(tokens=[2], max_new_tokens=32)
    with pytest.raises(TransitionError, match=f"job {answer.job_id} cannot be cancelled: it has succeeded already"):
        await client.cancel(answer.job_id)
    job = await client.submit(tokens=[2], max_new_tokens=96)
    assert [(await client.cancel(job.job_id)).state for _ in range(2)] == ["cancelled", "cancelled"]


async def test_an_offset_beyond_the_end_is_named_with_what_is_allowed(start: Start, connect: Connect) -> None:
    client = connect(await start())
    answer = await client.generate(tokens=[2], seed=1, max_new_tokens=64)
    assert answer.usage.canvases == 2
    with pytest.raises(InvalidRequest, match="from_canvas: is 3; allowed is 0 to 2: the job has ended with 2 canvases"):
        await read(client, answer.job_id, 3)
    assert [type(event) for event in await read(client, answer.job_id, 2)] == [Accepted, Finished]


async def test_a_running_job_may_be_watched_from_any_canvas_it_can_get(start: Start, connect: Connect) -> None:
    client = connect(await start(**SLOW))
    job = await client.submit(tokens=[2], seed=1, max_new_tokens=96)
    with pytest.raises(InvalidRequest, match="from_canvas: is 4; allowed is 0 to 3: the job writes at most 3 canvases"):
        await read(client, job.job_id, 4)
    watch = client.watch(job.job_id, 3)
    assert isinstance(await anext(watch), Accepted)
    await watch.aclose()


async def test_a_drain_sends_the_jobs_of_a_replica_elsewhere(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=10.0, steps_per_canvas=40)
    client = connect(stack)
    job = await client.submit(tokens=[2], seed=1, max_new_tokens=64)
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    await stack.add_replica("denoiser-1", step_time_ms=1.0)
    assert await client.drain("denoiser-0") == 1
    assert isinstance((await read(client, job.job_id, 0))[-1], Finished)
    done = await client.get(job.job_id)
    assert (done.replica, done.usage.attempts, done.losses) == ("denoiser-1", 2, 0)
    assert [(row.epoch, row.replica, row.reason) for row in done.history] == [(1, "denoiser-0", "DRAINED")]
    assert done.created_at <= done.history[0].started_at <= done.history[0].ended_at


async def test_a_replica_that_is_not_there_cannot_be_drained(start: Start, connect: Connect) -> None:
    client = connect(await start())
    with pytest.raises(ReplicaNotFound, match="nobody"):
        await client.drain("nobody")
    with pytest.raises(InvalidRequest, match="replica: is 'no body'"):
        await client.drain("no body")
    with pytest.raises(InvalidRequest, match="replica: is ''"):
        await client.drain("")
