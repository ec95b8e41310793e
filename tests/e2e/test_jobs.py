"""The Jobs and Cluster services: work that outlives its connection, read through any router."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.client import Committed, EaselClient, Finished, JobView
from cluster.core import Priority
from cluster.errors import InvalidRequest, JobCancelled, JobNotFound
from cluster.jobs.connection import connect as connect_redis
from cluster.jobs.records import NewJob
from cluster.jobs.states import JobState
from cluster.jobs.store import JobStore
from tests.e2e.conftest import Connect, Start, until


async def _ended(client: EaselClient, job_id: str) -> JobView:
    async def has_ended() -> bool:
        return (await client.get(job_id)).state not in {"queued", "running"}

    await until(has_ended)
    return await client.get(job_id)


async def test_a_submitted_job_runs_without_its_caller(start: Start, connect: Connect) -> None:
    client = connect(await start())
    job = await client.submit("count 31 to 34", seed=3, max_new_tokens=64)
    assert job.state in {"queued", "running"}
    done = await _ended(client, job.job_id)
    answer = await client.generate("count 31 to 34", seed=3, max_new_tokens=64)
    assert (done.state, done.text, done.token_ids) == ("succeeded", answer.text, answer.token_ids)


async def test_another_router_watches_a_job_from_any_canvas(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=10.0)
    await stack.add_router("router-1")
    first, second = connect(stack), connect(stack, "router-1")
    job = await first.submit(tokens=[2, 3], seed=1, max_new_tokens=128)
    watched = [event async for event in second.watch(job.job_id, from_canvas=1)]
    assert [event.canvas_index for event in watched if isinstance(event, Committed)] == [1, 2, 3]
    assert isinstance(watched[-1], Finished)
    again = [event async for event in first.watch(job.job_id)]
    text = "".join(event.text for event in again if isinstance(event, Committed))
    assert text == (await second.get(job.job_id)).text


async def test_leaving_a_watch_leaves_the_job_alone(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=10.0, steps_per_canvas=10)
    client = connect(stack)
    job = await client.submit(tokens=[2], seed=1, max_new_tokens=64)
    watch = client.watch(job.job_id)
    await anext(watch)
    await watch.aclose()
    assert (await _ended(client, job.job_id)).state == "succeeded"


async def test_a_watch_of_a_cancelled_job_ends_with_cancelled(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=20.0, steps_per_canvas=50)
    await stack.add_router("router-1")
    client, other = connect(stack), connect(stack, "router-1")
    job = await client.submit(tokens=[2], seed=1, max_new_tokens=64)

    async def watch() -> None:
        async for _ in other.watch(job.job_id):
            pass

    watching = asyncio.create_task(watch())
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    assert (await other.cancel(job.job_id)).state == "cancelled"
    with pytest.raises(JobCancelled):
        await watching
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 0)


async def test_jobs_are_listed_newest_first_by_state(start: Start, connect: Connect) -> None:
    client = connect(await start())
    ids = [(await client.submit(tokens=[2], seed=n, max_new_tokens=32)).job_id for n in range(5)]
    for job_id in ids:
        await _ended(client, job_id)
    assert [job.job_id async for job in client.jobs()] == ids[::-1]
    assert [job.job_id async for job in client.jobs("succeeded")] == ids[::-1]
    assert [job.job_id async for job in client.jobs("failed")] == []


async def test_an_unknown_job_is_not_found_and_a_bad_offset_is_named(start: Start, connect: Connect) -> None:
    client = connect(await start())
    with pytest.raises(JobNotFound):
        await client.get("nobody")
    with pytest.raises(JobNotFound):
        await client.cancel("nobody")
    with pytest.raises(InvalidRequest, match="from_canvas"):
        async for _ in client.watch("nobody", from_canvas=-1):
            pass


async def test_status_counts_replicas_slots_and_the_queue(start: Start, connect: Connect) -> None:
    stack = await start(replicas=2, slots=1, step_time_ms=20.0, steps_per_canvas=100)
    client = connect(stack)
    calls = [asyncio.create_task(client.generate(tokens=[2], max_new_tokens=96)) for _ in range(3)]
    await until(lambda: all(engine.stats().active_jobs == 1 for engine in stack.engines.values()))
    await asyncio.sleep(0.1)
    status = await client.status()
    assert (status.slots, status.active, status.queued, len(status.replicas)) == (2, 2, 1, 2)
    for call in calls:
        call.cancel()


async def test_health_and_reflection_answer_as_the_standard_says(start: Start) -> None:
    stack = await start()
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "easel.v1.Generation", "easel.v1.Jobs"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # aio is fine
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for listed in reflection.ServerReflectionInfo(iter([request])):
            names = {service.name for service in listed.list_services_response.service}
    assert {"easel.v1.Generation", "easel.v1.Jobs", "easel.v1.Cluster", "grpc.health.v1.Health"} <= names


async def test_health_says_not_serving_without_a_replica(start: Start) -> None:
    stack = await start(replicas=0)
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_job_that_no_router_can_bring_ends_with_its_history(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.denoiser.CLAIM_PATIENCE_S", 0.3)
    stack = await start(slots=1)
    client = connect(stack)
    store = JobStore(connect_redis(stack.settings.state.url), namespace=stack.settings.state.namespace)
    await store.submit(NewJob("orphan", "d", b"", Priority.NORMAL, "", 1, 1, None, "router-that-never-was"))
    assert (await client.status()).active == 1

    async def is_failed() -> bool:
        return (await store.get("orphan")).state is JobState.FAILED

    await until(is_failed)
    await store.close()
    assert (await client.generate(tokens=[2], max_new_tokens=32)).usage.canvases == 1


async def test_a_replica_that_leaves_gives_its_jobs_back(start: Start, connect: Connect) -> None:
    stack = await start(slots=2, step_time_ms=20.0, steps_per_canvas=200)
    client = connect(stack)
    ids = [(await client.submit(tokens=[2], max_new_tokens=96)).job_id for _ in range(2)]
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 2)
    await stack.replicas.pop("denoiser-0").close()
    jobs = [await client.get(job_id) for job_id in ids]
    assert [job.state for job in jobs] == ["queued", "queued"]
    assert [[row.reason for row in job.history] for job in jobs] == [["DRAINED"], ["DRAINED"]]
    assert not (await client.status()).replicas
