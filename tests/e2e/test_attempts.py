"""A replica as its router sees it: here the test is the router, and calls the internal service by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import grpc
import pytest
import pytest_asyncio

from cluster.checkpoint import read_checkpoint
from cluster.core import JobSpec, Placement
from cluster.errors import EaselError, JobCancelled, JobReleased, StaleEpoch, TransitionError
from cluster.jobs.connection import connect as connect_redis
from cluster.jobs.doorbell import Doorbell
from cluster.jobs.records import Checkpoint, JobRecord, NewJob
from cluster.jobs.states import AttemptEnd, JobState
from cluster.jobs.store import JobStore
from cluster.rpc import convert
from cluster.rpc.easel.internal.v1 import denoiser_pb2 as pb
from cluster.rpc.easel.internal.v1 import denoiser_pb2_grpc as pb_grpc
from cluster.rpc.status import error_from_rpc
from deployments.engine.api import CanvasCheckpoint
from deployments.engine.fake import FakeEngine
from deployments.replica import Replica
from deployments.writing import Autosave
from tests.e2e.conftest import CHECKPOINT, Stack, Start, until

ROUTER = "the-test"
CARD = read_checkpoint(CHECKPOINT).card
Call = grpc.aio.UnaryStreamCall[pb.RunRequest, pb.RunEvent]


@dataclass
class Desk:
    """A router of our own, next to router-0, which takes what is handed over."""

    stack: Stack
    store: JobStore
    closing: AsyncExitStack

    @property
    def engine(self) -> FakeEngine:
        return self.stack.engines["denoiser-0"]

    @property
    def replica(self) -> Replica:
        return self.stack.replicas["denoiser-0"]

    async def submit(self, job_id: str = "job") -> Placement | None:
        spec = self.spec(job_id)
        body = convert.job_spec_to_proto(spec).SerializeToString()
        _, placement = await self.store.submit(NewJob(job_id, "d", body, spec.priority, "", 5, 2, None, ROUTER))
        return placement

    async def assigned(self, job_id: str = "job") -> Placement:
        placement = await self.submit(job_id)
        assert placement is not None
        return placement

    async def again(self, job_id: str = "job") -> Placement:
        """Its placement once it is back from the queue."""
        found: list[Placement] = []

        async def is_placed() -> bool:
            await self.store.assign()
            placement = await self.store.placement(job_id)
            found.extend([placement] if placement is not None and placement.epoch > 1 else [])
            return bool(found)

        await until(is_placed)
        return found[0]

    def run(self, placement: Placement, *, drafts: bool = False, timeout_s: float | None = None) -> Call:
        channel = grpc.aio.insecure_channel(placement.address)
        self.closing.push_async_callback(channel.close)
        request = pb.RunRequest(
            spec=convert.job_spec_to_proto(self.spec(placement.job_id)),
            epoch=placement.epoch,
            committed_canvases=placement.committed_canvases,
            drafts=drafts,
        )
        return pb_grpc.DenoiserStub(channel).Run(request, timeout=timeout_s)

    async def running(self, *, drafts: bool = False) -> tuple[Placement, Call]:
        """A job that is in the middle of its first canvas."""
        placement = await self.assigned()
        call = self.run(placement, drafts=drafts)
        steps = self.engine.stats().canvas_steps
        await until(lambda: self.engine.stats().canvas_steps >= steps + 5)
        return placement, call

    async def reaches(self, state: JobState, job_id: str = "job") -> JobRecord:
        async def is_there() -> bool:
            return (await self.store.get(job_id)).state is state

        await until(is_there)
        return await self.store.get(job_id)

    @staticmethod
    def spec(job_id: str) -> JobSpec:
        return JobSpec(job_id, (2, 3), replace(CARD.defaults, seed=5, max_new_tokens=64))


@pytest_asyncio.fixture
async def desk(start: Start) -> AsyncIterator[Desk]:
    stack = await start(state={"lease_ms": 60_000}, slots=1, steps_per_canvas=30, step_time_ms=5.0)
    async with AsyncExitStack() as closing:
        store = JobStore.of(connect_redis(stack.settings.state.url), stack.settings.state)
        closing.push_async_callback(store.close)
        await store.heartbeat_router(ROUTER)
        yield Desk(stack, store, closing)


async def ended(call: Call) -> tuple[list[pb.RunEvent], EaselError | None]:
    """Everything a call brings, and its error."""
    events = []
    try:
        async for event in call:
            events.append(event)
    except grpc.aio.AioRpcError as error:
        return events, error_from_rpc(error)
    return events, None


def canvases(events: list[pb.RunEvent]) -> list[int]:
    return [event.committed.canvas_index for event in events if event.HasField("committed")]


def steps(events: list[pb.RunEvent]) -> list[int]:
    return [event.draft.step for event in events if event.HasField("draft")]


async def test_a_run_tells_every_canvas_and_its_end_with_the_last(desk: Desk) -> None:
    events, error = await ended(desk.run(await desk.assigned(), drafts=True))
    assert error is None
    assert canvases(events) == [0, 1]
    assert steps(events) == [*range(1, 31), *range(1, 31)]
    assert [event.HasField("finished") for event in events if event.HasField("committed")] == [False, True]


async def test_a_second_run_of_an_attempt_is_refused_and_leaves_the_first_alone(desk: Desk) -> None:
    placement, first = await desk.running()
    events, error = await ended(desk.run(placement))
    assert isinstance(error, TransitionError)
    assert "runs already" in str(error)
    assert events == []
    events, error = await ended(first)
    assert (canvases(events), error) == ([0, 1], None)


async def test_a_broken_stream_hands_the_job_over_with_its_canvas(desk: Desk) -> None:
    _, call = await desk.running()
    call.cancel()
    record = await desk.reaches(JobState.SUCCEEDED)
    assert record.router == "router-0"
    assert [attempt.reason for attempt in record.history] == ["ROUTER_LOST"]
    assert desk.engine.stats().canvas_steps == record.denoising_steps == 60


async def test_a_stream_that_reached_its_deadline_fails_the_job(desk: Desk) -> None:
    _, error = await ended(desk.run(await desk.assigned(), timeout_s=0.1))
    assert error is not None
    record = await desk.reaches(JobState.FAILED)
    assert record.failure is not None
    assert record.failure.reason == "DEADLINE_EXCEEDED"
    await until(lambda: desk.engine.stats().active_jobs == 0)


async def test_a_run_that_finds_no_images_any_more_ends_without_touching_the_engine(desk: Desk) -> None:
    placement = await desk.assigned()
    spec = convert.job_spec_to_proto(replace(desk.spec("job"), image_count=1))
    async with grpc.aio.insecure_channel(placement.address) as channel:
        call = pb_grpc.DenoiserStub(channel).Run(pb.RunRequest(spec=spec, epoch=placement.epoch))
        _, error = await ended(call)
    assert isinstance(error, TransitionError)
    assert "has no images in Redis any more" in str(error)
    assert desk.engine.stats().canvas_steps == 0


async def test_a_preempted_job_is_released_with_its_canvas_and_goes_on_there(desk: Desk) -> None:
    placement, call = await desk.running(drafts=True)
    desk.replica._rang(f"preempt:{placement.epoch}", "job")
    before, error = await ended(call)
    assert isinstance(error, JobReleased)
    after, error = await ended(desk.run(await desk.again(), drafts=True))
    assert error is None
    # The drafts of the first canvas: each step once, over both runs.
    assert (steps(before) + steps(after))[:30] == list(range(1, 31))
    assert canvases(before + after) == [0, 1]
    assert [attempt.reason for attempt in (await desk.store.get("job")).history] == ["PREEMPTED"]


async def test_a_job_that_is_preempted_before_its_router_brings_it_goes_at_once(desk: Desk) -> None:
    placement = await desk.assigned()
    desk.replica._rang(f"preempt:{placement.epoch}", "job")
    events, error = await ended(desk.run(placement))
    assert isinstance(error, JobReleased)
    assert events == []
    assert desk.engine.stats().canvas_steps <= 1


async def test_a_checkpoint_of_another_model_is_not_used(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    placement = await desk.assigned()
    foreign = Checkpoint("another model", 0, 29, b"payload")
    await desk.store.release("job", placement.epoch, AttemptEnd.DRAINED, "a test", checkpoint=foreign)
    events, error = await ended(desk.run(await desk.again(), drafts=True))
    assert error is None
    assert steps(events)[:30] == list(range(1, 31))
    assert any("another model" in record.getMessage() for record in caplog.records)


async def test_a_checkpoint_of_a_canvas_that_was_committed_since_is_not_used(desk: Desk) -> None:
    placement = await desk.assigned()
    call = desk.run(placement)
    await anext(aiter(call))
    await desk.store.reap("job", placement.epoch, AttemptEnd.REPLICA_LOST, "a test")
    # The scripts delete it with the commit; this one stands for a write that came late.
    old: list[str | int | bytes] = ["version", CARD.version, "canvas_index", 0, "step", 7, "payload", b"old"]
    await desk.store._redis.hset(desk.store._keys.checkpoint("job"), items=old)
    events, error = await ended(desk.run(await desk.again(), drafts=True))
    assert (canvases(events), steps(events), error) == ([1], list(range(1, 31)), None)


async def test_only_the_newest_checkpoint_is_saved_and_a_refusal_is_no_matter(desk: Desk) -> None:
    placement = await desk.assigned()
    saving, late = Autosave(desk.store, "job", placement.epoch), Autosave(desk.store, "job", placement.epoch - 1)
    for step in (1, 2, 3):
        saving.offer(CanvasCheckpoint(CARD.version, 0, step, b"canvas"))
    late.offer(CanvasCheckpoint(CARD.version, 0, 9, b"of an old epoch"))

    async def is_saved() -> bool:
        kept = await desk.store.checkpoint("job")
        return kept is not None and kept.step == 3

    await until(is_saved)
    await saving.close()
    await late.close()
    assert await is_saved()


async def test_a_cancelled_job_stops_and_writes_nothing(desk: Desk) -> None:
    _, call = await desk.running()
    await desk.store.cancel("job")
    _, error = await ended(call)
    assert isinstance(error, JobCancelled)
    await until(lambda: desk.engine.stats().active_jobs == 0)
    assert (await desk.store.get("job")).history == ()


async def test_a_job_that_was_taken_away_stops(desk: Desk) -> None:
    placement, call = await desk.running()
    await desk.store.reap("job", placement.epoch, AttemptEnd.REPLICA_LOST, "a test")
    _, error = await ended(call)
    assert isinstance(error, StaleEpoch)


async def test_a_job_that_no_router_brings_goes_back_to_the_queue(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.denoiser.CLAIM_PATIENCE_S", 0.3)
    await desk.assigned()
    record = await desk.reaches(JobState.SUCCEEDED)  # router-0 adopts it: ours never came
    assert (record.router, [attempt.reason for attempt in record.history]) == ("router-0", ["UNCLAIMED"])


async def test_a_run_that_comes_to_a_draining_replica_goes_elsewhere_at_once(desk: Desk) -> None:
    placement = await desk.assigned()
    desk.replica._denoiser._turning_away = True
    events, error = await ended(desk.run(placement))
    assert isinstance(error, JobReleased)
    assert events == []
    assert [attempt.reason for attempt in (await desk.store.get("job")).history] == ["DRAINED"]


async def test_a_job_that_does_not_fit_the_model_fails_at_once(desk: Desk) -> None:
    placement = await desk.assigned()
    request = pb.RunRequest(spec=convert.job_spec_to_proto(desk.spec("job")), epoch=placement.epoch)
    request.spec.prompt_tokens[0] = CARD.vocab_size
    async with grpc.aio.insecure_channel(placement.address) as channel:
        _, error = await ended(pb_grpc.DenoiserStub(channel).Run(request))
    assert "refused job job: prompt_tokens holds token" in str(error)
    assert (await desk.store.get("job")).state is JobState.FAILED


async def test_a_reader_that_does_not_read_loses_drafts_and_no_canvas(desk: Desk) -> None:
    placement = await desk.assigned()
    call = desk.run(placement, drafts=True)
    await desk.reaches(JobState.SUCCEEDED)
    events, error = await ended(call)
    assert (canvases(events), error) == ([0, 1], None)


async def test_rings_of_a_replica_come_through_redis(desk: Desk) -> None:
    """`drain` and `preempt` as the scripts send them."""
    _, call = await desk.running()
    doorbell = Doorbell(connect_redis(desk.stack.settings.state.url), namespace=desk.stack.settings.state.namespace)
    rung: list[tuple[str, str]] = []
    doorbell.on_ring(lambda kind, job_id: rung.append((kind, job_id)))
    await doorbell.start(ROUTER)
    await desk.store.drain_replica("denoiser-0")
    _, error = await ended(call)
    assert isinstance(error, JobReleased)
    await until(lambda: ("released:1", "job") in rung)
    await doorbell.close()
    await doorbell._redis.aclose()
