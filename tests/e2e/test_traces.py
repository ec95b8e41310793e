"""Traces, from the client's span to canvases, as a collector that speaks OTLP receives them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest
import pytest_asyncio
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer as OtelApiTracer

from cluster.config import TraceSettings
from cluster.telemetry.recorder import Unrecorded
from cluster.telemetry.telemetry import Telemetry, make_telemetry
from tests.e2e.collector import Collector, attributes, collecting
from tests.e2e.conftest import Connect, Start, until
from tests.e2e.test_metrics import SLOW, ask, busy, made_steps
from tests.e2e.test_release import crash

Make = Callable[..., Callable[[str], Telemetry]]
CLOSE_S = 5.0


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest_asyncio.fixture
async def traced(collector: Collector) -> AsyncIterator[Make]:
    """Telemetry for each process of a stack, sent to the collector; closed after the stack."""
    with ExitStack() as owned:

        def make(**values: object) -> Callable[[str], Telemetry]:
            settings = TraceSettings.model_validate({"enabled": True, "endpoint": collector.address} | values)

            def of(name: str) -> Telemetry:
                service = f"easel-{name.partition('-')[0]}"
                made = make_telemetry(settings, Unrecorded(), process=name, service=service)
                owned.callback(made.tracer.close, CLOSE_S)
                return made

            return of

        yield make


@pytest.fixture
def callers_tracer() -> Iterator[OtelApiTracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    yield provider.get_tracer("a backend service")
    provider.shutdown()


def children(collector: Collector, parent: Span) -> list[Span]:
    return [span for _, span in collector.spans if span.parent_span_id == parent.span_id]


async def test_one_trace_spans_client_router_and_denoiser(
    start: Start, connect: Connect, collector: Collector, traced: Make, callers_tracer: OtelApiTracer
) -> None:
    stack = await start(telemetry=traced())
    with callers_tracer.start_as_current_span("the caller's work") as work:
        answer = await connect(stack).generate(tokens=[2, 3], seed=5, max_new_tokens=64, request_id="job")
    await until(lambda: len(collector.spans) >= 4 + answer.usage.canvases)
    call, job = collector.only("easel.v1.Generation/Generate"), collector.only("job")
    attempt, run, canvases = collector.only("attempt"), collector.only("denoise"), collector.named("canvas")
    trace_ids = {span.trace_id.hex() for _, span in collector.spans}
    assert trace_ids == {f"{work.get_span_context().trace_id:032x}"}
    assert call.parent_span_id.hex() == f"{work.get_span_context().span_id:016x}"
    chain = [call, job, attempt, run]
    assert [span.parent_span_id for span in chain[1:]] == [span.span_id for span in chain[:-1]]
    assert {span.parent_span_id for span in canvases} == {run.span_id}
    assert [attributes(span)["easel.canvas_index"] for span in canvases] == list(range(answer.usage.canvases))
    assert sum(attributes(span)["easel.denoising_steps"] for span in canvases) == answer.usage.denoising_steps
    assert attributes(job)["easel.outcome"] == "succeeded"
    services = {span.name: service for service, span in collector.spans}
    assert (services["job"], services["denoise"]) == ("easel-router", "easel-denoiser")
    assert job.start_time_unix_nano <= attempt.start_time_unix_nano <= run.start_time_unix_nano
    assert not any(span.events for span in canvases)


async def test_steps_are_events_of_their_canvas_where_settings_say_so(
    start: Start, connect: Connect, collector: Collector, traced: Make
) -> None:
    stack = await start(telemetry=traced(steps=True))
    answer = await connect(stack).generate(tokens=[2, 3], seed=5, max_new_tokens=64)
    await until(lambda: len(collector.named("canvas")) == answer.usage.canvases)
    told = [len(span.events) for span in collector.named("canvas")]
    assert sum(told) == answer.usage.denoising_steps
    (first, *_) = collector.named("canvas")[0].events
    assert {item.key for item in first.attributes} == {"easel.step", "easel.mean_entropy", "easel.accepted_tokens"}


async def test_a_job_that_loses_its_replica_has_two_attempts_under_one_job(
    start: Start, connect: Connect, collector: Collector, traced: Make
) -> None:
    stack = await start(replicas=2, telemetry=traced(), **SLOW)
    call = ask(connect(stack), "job")
    await until(lambda: made_steps(stack) >= 10)
    first = busy(stack)
    await crash(stack.replicas.pop(first))
    answer = await call
    await until(lambda: len(collector.named("job")) == 1 and len(collector.named("attempt")) == 2)
    lost, second = collector.named("attempt")
    job = collector.only("job")
    assert lost.parent_span_id == second.parent_span_id == job.span_id
    assert lost.trace_id == second.trace_id == job.trace_id
    assert lost.status.code == Status.STATUS_CODE_ERROR
    assert second.status.code != Status.STATUS_CODE_ERROR
    assert [attributes(span)["easel.replica"] for span in (lost, second)] == [first, answer.replica]
    assert [attributes(span)["easel.epoch"] for span in (lost, second)] == [1, 2]
    await until(lambda: any(span.name == "denoise" for span in children(collector, second)))
    (run,) = children(collector, second)
    assert [event.name for event in run.events] == ["continues"]


async def test_a_job_that_another_router_adopts_stays_in_its_trace(
    start: Start, connect: Connect, collector: Collector, traced: Make
) -> None:
    state = {"lease_ms": 600, "heartbeat_ms": 100}
    stack = await start(replicas=2, state=state, telemetry=traced(), **SLOW)
    await stack.add_router("router-1")
    second = connect(stack, "router-1")
    await connect(stack).submit(tokens=[2, 3], seed=5, max_new_tokens=64, request_id="job")
    await until(lambda: made_steps(stack) >= 5)
    await stack.crash_router("router-0")
    async for _ in second.watch("job"):
        pass
    await until(lambda: len(collector.named("job")) == 1)
    await until(lambda: len(collector.named("attempt")) == 2)
    call, job = collector.only("easel.v1.Jobs/Submit"), collector.only("job")
    attempts = collector.named("attempt")
    assert job.parent_span_id == call.span_id
    assert {span.parent_span_id for span in attempts} == {job.span_id}
    assert [attributes(span)["easel.router"] for span in attempts] == ["router-0", "router-1"]
    assert job.start_time_unix_nano <= attempts[0].start_time_unix_nano + 50_000_000  # Redis tells the age in ms


async def test_a_caller_that_does_not_sample_leaves_no_span(
    start: Start, connect: Connect, collector: Collector, traced: Make, callers_tracer: OtelApiTracer
) -> None:
    stack = await start(telemetry=traced(sample_ratio=0.0))
    await connect(stack).generate(tokens=[2, 3], seed=5, max_new_tokens=32)
    with callers_tracer.start_as_current_span("the caller's work"):
        await connect(stack).generate(tokens=[2, 3], seed=5, max_new_tokens=32, request_id="sampled")
    await until(lambda: len(collector.named("job")) == 1)
    assert attributes(collector.only("job"))["easel.job_id"] == "sampled"


async def test_nothing_is_exported_or_stored_when_traces_are_off(
    start: Start, connect: Connect, collector: Collector, callers_tracer: OtelApiTracer
) -> None:
    off = TraceSettings(endpoint=collector.address)
    stack = await start(telemetry=lambda name: make_telemetry(off, Unrecorded(), process=name, service="easel"))
    with callers_tracer.start_as_current_span("the caller's work"):
        await connect(stack).generate(tokens=[2, 3], seed=5, max_new_tokens=32, request_id="job")
    record = await stack.routers["router-0"]._store.get("job")
    assert b"00-" not in record.spec
    assert not collector.spans


async def test_a_collector_that_hangs_holds_up_no_job_and_no_end(
    start: Start, connect: Connect, collector: Collector, traced: Make
) -> None:
    collector.answers.clear()
    telemetry = traced(queue_spans=16, steps=True, export_timeout_s=30)
    stack = await start(telemetry=telemetry, slots=4, step_time_ms=0.1)
    client = connect(stack)
    async with asyncio.timeout(20.0):
        await asyncio.gather(*(client.generate(tokens=[2, 3], seed=n, max_new_tokens=64) for n in range(40)))
    async with asyncio.timeout(CLOSE_S):  # far less than the collector lets it wait
        await asyncio.to_thread(stack.routers["router-0"]._telemetry.tracer.close, 0.2)
    assert not collector.spans
    collector.answers.set()
