"""What routers and replicas count, on a whole stack: the recorder is strict about names and labels."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.client import Answer, EaselClient
from cluster.core import Priority
from cluster.errors import InvalidRequest, Unauthenticated
from cluster.redis_server import RedisServer
from cluster.security.api_keys import new_key
from cluster.telemetry import metrics
from cluster.telemetry.telemetry import Telemetry
from tests.e2e.conftest import Connect, Stack, Start, until
from tests.e2e.test_release import crash
from tests.recorder import Recorded

SLOW = {"slots": 1, "steps_per_canvas": 30, "step_time_ms": 5.0}


class Records:
    """A recorder for each process, and what all of them hold together."""

    def __init__(self) -> None:
        self.of: dict[str, Recorded] = defaultdict(Recorded)

    def telemetry(self, name: str) -> Telemetry:
        return Telemetry(self.of[name])

    def total(self, metric: metrics.Metric, *labels: str) -> float:
        return sum(recorded.total(metric, *labels) for recorded in self.of.values())

    def values(self, metric: metrics.Metric, *labels: str) -> list[float]:
        return [value for recorded in self.of.values() for value in recorded.values(metric, *labels)]

    def gauge(self, name: str, metric: metrics.Metric, *labels: str) -> float | None:
        return self.of[name].last[metric.name].get(labels)


@pytest.fixture
def records() -> Records:
    return Records()


def ask(client: EaselClient, name: str, priority: Priority = Priority.NORMAL) -> asyncio.Task[Answer]:
    work = client.generate(tokens=[2, 3], seed=5, max_new_tokens=64, request_id=name, priority=priority)
    return asyncio.create_task(work)


def busy(stack: Stack) -> str:
    (name,) = [name for name, engine in stack.engines.items() if engine.stats().active_jobs]
    return name


def made_steps(stack: Stack) -> int:
    return sum(engine.stats().canvas_steps for engine in stack.engines.values())


async def test_an_answer_is_counted_by_its_canvases_steps_and_tokens(
    start: Start, connect: Connect, records: Records
) -> None:
    stack = await start(telemetry=records.telemetry)
    answer = await connect(stack).generate(tokens=[2, 3], seed=5, max_new_tokens=64)
    await until(lambda: records.total(metrics.JOBS) == 1)
    assert records.total(metrics.COMMITS) == answer.usage.canvases
    assert records.total(metrics.TOKENS) == len(answer.token_ids)
    assert sum(records.values(metrics.STEPS_PER_CANVAS)) == answer.usage.denoising_steps
    assert records.total(metrics.JOBS, "succeeded") == 1
    assert len(records.values(metrics.JOB_DURATION, "succeeded")) == 1
    assert len(records.values(metrics.QUEUE_WAIT, "normal")) == 1
    assert len(records.values(metrics.STEP_DURATION)) >= answer.usage.denoising_steps
    await until(lambda: records.total(metrics.CALLS, "Generate", "OK") == 1)
    assert records.gauge("router-0", metrics.OPEN_STREAMS, "Generate") == 0
    assert len(records.values(metrics.REDIS, "submit+assign")) == 1
    assert len(records.values(metrics.REDIS, "commit")) == answer.usage.canvases
    await until(lambda: records.total(metrics.CANVAS_STEPS) == answer.usage.denoising_steps)


async def test_a_bad_request_is_counted_by_its_status_and_makes_no_job(
    start: Start, connect: Connect, records: Records
) -> None:
    stack = await start(telemetry=records.telemetry)
    with pytest.raises(InvalidRequest):
        await connect(stack).generate(tokens=[2, 3], max_new_tokens=0)
    # The caller may hear of the end a moment before it is counted.
    await until(lambda: records.total(metrics.CALLS, "Generate", "INVALID_ARGUMENT") == 1)
    assert records.total(metrics.JOBS) == 0


async def test_a_caller_without_a_credential_is_counted_and_names_no_label_of_its_own(
    start: Start, connect: Connect, records: Records, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(new_key("acme")[1] + "\n")
    stack = await start(telemetry=records.telemetry, security={"api_keys_file": str(keys)})
    with pytest.raises(Unauthenticated):
        await connect(stack).generate(tokens=[2, 3])
    await until(lambda: records.total(metrics.CALLS, "Generate", "UNAUTHENTICATED") == 1)
    async with grpc.aio.insecure_channel(next(iter(stack.addresses.values()))) as channel:
        made_up: Any = channel.unary_unary("/easel.v1.Generation/Whatever")
        with pytest.raises(grpc.aio.AioRpcError):
            await made_up(b"", timeout=5.0)
    await until(lambda: records.total(metrics.CALLS, "unknown", "UNAUTHENTICATED") == 1)


async def test_a_caller_that_leaves_is_counted_as_cancelled(start: Start, connect: Connect, records: Records) -> None:
    stack = await start(telemetry=records.telemetry, **SLOW)
    call = ask(connect(stack), "job")
    await until(lambda: made_steps(stack) >= 2)
    await until(lambda: records.gauge("router-0", metrics.OPEN_STREAMS, "Generate") == 1)
    call.cancel()
    await until(lambda: records.total(metrics.JOBS, "cancelled") == 1)
    await until(lambda: records.total(metrics.CALLS, "Generate", "CANCELLED") == 1)


async def test_jobs_that_wait_are_counted_by_priority(start: Start, connect: Connect, records: Records) -> None:
    stack = await start(telemetry=records.telemetry, **SLOW)
    client = connect(stack)
    calls = [ask(client, "first", Priority.HIGH)]
    await until(lambda: made_steps(stack) >= 1)
    calls += [ask(client, "second"), ask(client, "third", Priority.BATCH)]
    await until(lambda: records.gauge("router-0", metrics.QUEUE_JOBS, "batch") == 1)
    await until(lambda: records.gauge("router-0", metrics.QUEUE_JOBS, "normal") == 1)
    assert records.gauge("router-0", metrics.QUEUE_JOBS, "high") == 0
    assert records.gauge("router-0", metrics.REPLICAS, "ready") == 1
    assert records.gauge("router-0", metrics.ROUTERS) == 1
    await until(lambda: records.gauge("denoiser-0", metrics.ACTIVE_CANVASES, "denoiser-0") == 1)
    assert records.gauge("denoiser-0", metrics.SLOTS, "denoiser-0") == 1
    assert records.gauge("denoiser-0", metrics.FREE_SLOTS, "denoiser-0") == 0
    await asyncio.gather(*calls)
    waited_s = records.values(metrics.QUEUE_WAIT, "high") + records.values(metrics.QUEUE_WAIT, "batch")
    assert waited_s[0] < waited_s[1]
    await until(lambda: records.gauge("router-0", metrics.QUEUE_JOBS, "normal") == 0)


async def test_a_lost_replica_is_a_retry_with_the_time_until_the_next_step(
    start: Start, connect: Connect, records: Records
) -> None:
    stack = await start(replicas=2, telemetry=records.telemetry, **SLOW)
    call = ask(connect(stack), "job")
    await until(lambda: made_steps(stack) >= 10)
    await crash(stack.replicas.pop(busy(stack)))
    answer = await call
    assert records.total(metrics.RETRIES, "REPLICA_LOST") == 1
    (failover_s,) = records.of[answer.replica].values(metrics.FAILOVER, "REPLICA_LOST")
    assert failover_s > 0
    assert records.total(metrics.PREEMPTIONS) == records.total(metrics.DRAINED_JOBS) == 0
    assert records.total(metrics.COMMITS) == answer.usage.canvases  # the one in progress was never committed twice


async def test_a_preemption_and_a_drain_are_no_retries(start: Start, connect: Connect, records: Records) -> None:
    stack = await start(telemetry=records.telemetry, **SLOW)
    client = connect(stack)
    calls = [ask(client, "batch", Priority.BATCH)]
    await until(lambda: made_steps(stack) >= 5)
    calls.append(ask(client, "urgent", Priority.URGENT))
    await asyncio.gather(*calls)
    assert records.total(metrics.PREEMPTIONS) == 1
    calls = [ask(client, "drained")]
    before = made_steps(stack)
    await until(lambda: made_steps(stack) >= before + 5)
    await stack.add_replica("denoiser-1", **SLOW)
    await client.drain("denoiser-0")
    await asyncio.gather(*calls)
    assert records.total(metrics.DRAINS) == records.total(metrics.DRAINED_JOBS) == 1
    assert records.total(metrics.RETRIES) == 0
    assert len(records.values(metrics.FAILOVER, "DRAINED")) == len(records.values(metrics.FAILOVER, "PREEMPTED")) == 1


async def test_a_redis_that_is_away_is_counted(
    start: Start, connect: Connect, records: Records, own_redis: RedisServer
) -> None:
    state = {"url": own_redis.url, "timeout_s": 0.5}
    await start(state=state, telemetry=records.telemetry)
    own_redis.stop()
    await until(lambda: records.total(metrics.REDIS_ERRORS) >= 1)
    own_redis.start()


async def test_a_job_that_another_router_adopts_is_counted_once(
    start: Start, connect: Connect, records: Records
) -> None:
    state = {"lease_ms": 600, "heartbeat_ms": 100}
    stack = await start(replicas=2, state=state, telemetry=records.telemetry, **SLOW)
    await stack.add_router("router-1")
    second = connect(stack, "router-1")
    await connect(stack).submit(tokens=[2, 3], seed=5, max_new_tokens=64, request_id="job")
    await until(lambda: made_steps(stack) >= 5)
    await stack.crash_router("router-0")
    async for _ in second.watch("job"):
        pass
    await until(lambda: records.total(metrics.JOBS) >= 1)
    assert records.of["router-1"].total(metrics.JOBS, "succeeded") == records.total(metrics.JOBS) == 1
    assert records.total(metrics.RETRIES, "ROUTER_LOST") == 1
