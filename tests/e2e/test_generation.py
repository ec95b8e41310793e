"""The Generation service through a real router, Redis and replica, with a hand-calculable engine."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no type information

from cluster.client import Accepted, Committed, Draft, Finished
from cluster.errors import DeadlineExceeded, InvalidRequest, JobCancelled, JobFailed, QueueFull, RequestIdReused
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.easel.v1 import generation_pb2_grpc as v1_grpc
from tests.e2e.conftest import Connect, Start, until


async def test_the_same_request_and_seed_give_the_same_answer_on_every_replica(start: Start, connect: Connect) -> None:
    client = connect(await start(replicas=2))
    answers = await asyncio.gather(*(client.generate("count 31 to 34", seed=7, max_new_tokens=64) for _ in range(4)))
    assert len({answer.token_ids for answer in answers}) == 1
    assert {answer.replica for answer in answers} == {"denoiser-0", "denoiser-1"}


async def test_usage_tells_what_the_job_took(start: Start, connect: Connect) -> None:
    client = connect(await start(steps_per_canvas=3))
    answer = await client.generate(tokens=[2, 3, 4], seed=1, max_new_tokens=64)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.canvases, usage.denoising_steps, usage.attempts) == (3, 2, 6, 1)
    assert usage.generated_tokens == len(answer.token_ids)


async def test_a_stream_opens_with_accepted_and_closes_with_finished(start: Start, connect: Connect) -> None:
    client = connect(await start())
    events = [event async for event in client.stream(tokens=[2, 3], seed=1, max_new_tokens=96)]
    kinds = [type(event) for event in events]
    assert kinds == [Accepted, Committed, Committed, Committed, Finished]
    assert [event.canvas_index for event in events if isinstance(event, Committed)] == [0, 1, 2]


async def test_drafts_come_once_per_step_and_only_if_asked(start: Start, connect: Connect) -> None:
    client = connect(await start(steps_per_canvas=4))
    events = [event async for event in client.stream(tokens=[2, 3], seed=1, max_new_tokens=32, drafts=True)]
    assert [event.step for event in events if isinstance(event, Draft)] == [1, 2, 3, 4]


async def test_a_caller_that_leaves_stops_the_job_and_frees_its_slot(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=20.0, steps_per_canvas=40)
    client = connect(stack)
    call = asyncio.create_task(client.generate(tokens=[2], seed=1, max_new_tokens=96, request_id="left"))
    engine = stack.engines["denoiser-0"]
    await until(lambda: engine.stats().active_jobs == 1)
    call.cancel()
    await until(lambda: engine.stats().active_jobs == 0)
    await asyncio.sleep(0.1)
    assert (await client.get("left")).state == "cancelled"
    assert (await client.status()).active == 0


async def test_a_deadline_stops_the_job_at_the_next_step_and_is_recorded(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=20.0, steps_per_canvas=40)
    client = connect(stack)
    with pytest.raises(DeadlineExceeded):
        await client.generate(tokens=[2], seed=1, max_new_tokens=96, timeout_s=0.2, request_id="late")
    engine = stack.engines["denoiser-0"]
    await until(lambda: engine.stats().active_jobs == 0)
    job = await client.get("late")
    assert (job.state, job.problem and job.problem.reason) == ("failed", "DEADLINE_EXCEEDED")


async def test_the_grpc_deadline_is_the_jobs_deadline_when_it_names_none(start: Start) -> None:
    stack = await start(step_time_ms=20.0, steps_per_canvas=40)
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        stub = v1_grpc.GenerationStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(v1.GenerateRequest(token_ids=[2], request_id="d"), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 0)


async def test_a_deadline_in_the_queue_fails_the_job_without_a_slot(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=20.0, steps_per_canvas=100, slots=1)
    client = connect(stack)
    long = asyncio.create_task(client.generate(tokens=[2], seed=1, max_new_tokens=96))
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    with pytest.raises(DeadlineExceeded):
        await client.generate(tokens=[2], seed=2, timeout_s=0.2, request_id="queued")
    assert (await client.get("queued")).state == "failed"
    long.cancel()


async def test_a_full_queue_is_refused_with_the_time_to_come_back(start: Start) -> None:
    state = {"queue_limit": 1, "retry_after_ms": 1500}
    stack = await start(state=state, slots=1, step_time_ms=20.0, steps_per_canvas=100)
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        stub = v1_grpc.GenerationStub(channel)
        calls = [stub.Generate(v1.GenerateRequest(token_ids=[2])) for _ in range(2)]
        await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
        await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(v1.GenerateRequest(token_ids=[2]))
        for call in calls:
            call.cancel()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(caught.value.trailing_metadata() or ())
    details = status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_a_queued_job_gets_the_slot_of_the_job_before_it(start: Start, connect: Connect) -> None:
    client = connect(await start(slots=1, step_time_ms=2.0))
    answers = await asyncio.gather(*(client.generate(tokens=[2], seed=s, max_new_tokens=32) for s in range(6)))
    assert len(answers) == 6


async def test_the_same_request_id_joins_the_job_and_another_body_is_refused(start: Start, connect: Connect) -> None:
    client = connect(await start(step_time_ms=10.0))
    first, second = await asyncio.gather(
        *(client.generate("sort 40718", request_id="once", max_new_tokens=64) for _ in range(2))
    )
    assert (first.token_ids, first.seed) == (second.token_ids, second.seed)
    later = await client.generate("sort 40718", request_id="once", max_new_tokens=64)
    assert later.token_ids == first.token_ids
    assert later.usage.attempts == 1
    with pytest.raises(RequestIdReused):
        await client.generate("sort 99999", request_id="once", max_new_tokens=64)


async def test_one_of_two_joined_callers_can_leave_without_ending_the_job(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=10.0, steps_per_canvas=10)
    client = connect(stack)
    leaving = asyncio.create_task(client.generate(tokens=[2], request_id="two", max_new_tokens=64))
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    staying = asyncio.create_task(client.generate(tokens=[2], request_id="two", max_new_tokens=64))
    await asyncio.sleep(0.1)
    leaving.cancel()
    assert (await staying).usage.canvases == 2


async def test_a_stop_string_ends_the_answer_before_it(start: Start, connect: Connect) -> None:
    client = connect(await start())
    whole = await client.generate(tokens=[2, 3], seed=5, max_new_tokens=96)
    stop = whole.text[40:43]
    cut = await client.generate(tokens=[2, 3], seed=5, max_new_tokens=96, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


async def test_an_engine_that_breaks_leaves_the_slot_table_and_its_jobs_go_on_elsewhere(
    start: Start, connect: Connect
) -> None:
    stack = await start(fail_at_step=3)
    client = connect(stack)
    call = asyncio.create_task(client.generate(tokens=[2], seed=1, max_new_tokens=96, request_id="moved"))

    async def has_left() -> bool:
        return not (await client.status()).replicas

    await until(has_left)
    await stack.add_replica("denoiser-1")
    answer = await call
    assert (answer.replica, answer.usage.canvases, answer.usage.attempts) == ("denoiser-1", 3, 2)
    (lost,) = (await client.get("moved")).history
    assert (lost.replica, lost.reason) == ("denoiser-0", "ENGINE")


async def test_a_job_that_breaks_every_engine_fails_with_its_history(start: Start, connect: Connect) -> None:
    stack = await start(replicas=3, fail_at_step=3)
    client = connect(stack)
    with pytest.raises(JobFailed, match="3 attempts in a row ended without a new canvas: ENGINE on denoiser"):
        await client.generate(tokens=[2], seed=1, max_new_tokens=96, request_id="poison")
    job = await client.get("poison")
    assert (job.state, job.problem and job.problem.reason) == ("failed", "ATTEMPTS_EXHAUSTED")
    assert {row.replica for row in job.history} == {"denoiser-0", "denoiser-1", "denoiser-2"}


async def test_bad_requests_name_every_bad_field_before_any_compute(start: Start, connect: Connect) -> None:
    stack = await start()
    client = connect(stack)
    with pytest.raises(InvalidRequest) as caught:
        await client.generate("", t_min=-1.0, max_new_tokens=0)
    fields = {violation.field for violation in caught.value.violations}
    assert {"text", "sampling.t_min", "sampling.max_new_tokens"} <= fields
    assert stack.engines["denoiser-0"].stats().denoising_steps == 0


async def test_a_request_that_is_too_large_is_refused_by_name(start: Start) -> None:
    stack = await start()
    async with grpc.aio.insecure_channel(stack.addresses["router-0"]) as channel:
        stub = v1_grpc.GenerationStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(v1.GenerateRequest(text="x" * (10 * 2**20)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "bytes" in (caught.value.details() or "")


async def test_a_cancel_ends_a_waiting_caller_with_cancelled(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=20.0, steps_per_canvas=40)
    client = connect(stack)
    call = asyncio.create_task(client.generate(tokens=[2], seed=1, max_new_tokens=96, request_id="stop-it"))
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    await client.cancel("stop-it")
    with pytest.raises(JobCancelled):
        await call
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 0)


async def test_a_queue_limit_error_reaches_the_client_class(start: Start, connect: Connect) -> None:
    stack = await start(state={"queue_limit": 1}, slots=1, step_time_ms=20.0, steps_per_canvas=100)
    client = connect(stack)
    running = [asyncio.create_task(client.generate(tokens=[2], max_new_tokens=96)) for _ in range(2)]
    await until(lambda: stack.engines["denoiser-0"].stats().active_jobs == 1)
    await asyncio.sleep(0.1)
    with pytest.raises(QueueFull):
        await client.generate(tokens=[2])
    for task in running:
        task.cancel()


async def test_a_replica_that_cannot_be_reached_loses_no_job_and_draws_no_more(start: Start, connect: Connect) -> None:
    stack = await start(replicas=2, state={"lease_ms": 60_000})
    client = connect(stack)
    lost = stack.replicas["denoiser-0"]
    await lost._heartbeat.close()
    await lost._server.stop(None)
    answers = await asyncio.gather(*(client.generate(tokens=[2], seed=n, max_new_tokens=32) for n in range(4)))
    assert {answer.replica for answer in answers} == {"denoiser-1"}
    assert max(answer.usage.attempts for answer in answers) == 2
    later = await client.generate(tokens=[2], seed=9, max_new_tokens=32)
    assert (later.replica, later.usage.attempts) == ("denoiser-1", 1)


async def test_a_caller_that_leaves_at_any_moment_leaves_no_job_behind(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=5.0, steps_per_canvas=200, slots=4)
    client = connect(stack)
    await client.status()
    for number in range(60):
        call = asyncio.create_task(client.generate(tokens=[2], max_new_tokens=96, request_id=f"gone-{number}"))
        await asyncio.sleep(number * 0.0001)
        call.cancel()

    async def nothing_is_left() -> bool:
        return not [job async for job in client.jobs() if job.state in {"queued", "running"}]

    await until(nothing_is_left)
    assert (await client.status()).active == 0


async def test_a_caller_that_leaves_after_the_first_event_stops_the_job(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=10.0, steps_per_canvas=200)
    client = connect(stack)
    stream = client.stream(tokens=[2], max_new_tokens=96, request_id="glimpse")
    assert isinstance(await anext(stream), Accepted)
    await stream.aclose()

    async def is_cancelled() -> bool:
        return (await client.get("glimpse")).state == "cancelled"

    await until(is_cancelled)


async def test_joining_and_leaving_a_submitted_job_does_not_end_it(start: Start, connect: Connect) -> None:
    stack = await start(step_time_ms=10.0, steps_per_canvas=30)
    client = connect(stack)
    await client.submit(tokens=[2], max_new_tokens=32, request_id="kept")
    joined = asyncio.create_task(client.generate(tokens=[2], max_new_tokens=32, request_id="kept"))
    await asyncio.sleep(0.1)
    joined.cancel()

    async def is_done() -> bool:
        return (await client.get("kept")).state == "succeeded"

    await until(is_done)
