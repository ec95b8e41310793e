"""The health service `readiness`, which decides whether a router gets calls."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import EaselClient
from cluster.redis_server import RedisServer
from cluster.rpc.options import connection_age
from deployments.router import READINESS
from tests.e2e.conftest import Connect, Start, until


async def status_of(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # ships no type information for its methods
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
        return int(answer.status)


async def says(address: str, service: str, status: int) -> None:
    async def it_does() -> bool:
        return await status_of(address, service) == status

    await until(it_does)


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_router_is_ready_while_a_replica_answers_it(start: Start) -> None:
    stack = await start(replicas=0, state={"lease_ms": 600, "heartbeat_ms": 100})
    address = stack.addresses["router-0"]
    await says(address, READINESS, NOT_SERVING)
    replica = await stack.add_replica("replica-0")
    await says(address, READINESS, SERVING)
    await replica.drain()
    await says(address, READINESS, NOT_SERVING)


async def test_a_router_stays_ready_without_redis_and_tells_callers_to_come_back(
    start: Start, own_redis: RedisServer
) -> None:
    """Else an outage of Redis would take every router out of its Service, and calls would find nobody."""
    state = {"url": own_redis.url, "lease_ms": 600, "heartbeat_ms": 100, "timeout_s": 0.5}
    stack = await start(replicas=1, state=state)
    address = stack.addresses["router-0"]
    await says(address, READINESS, SERVING)
    own_redis.stop()
    await says(address, "", NOT_SERVING)
    assert await status_of(address, READINESS) == SERVING


async def test_a_router_is_ready_without_replicas_where_a_job_wakes_the_first(start: Start) -> None:
    stack = await start(replicas=0, denoiser={"autoscaling": {"min_replicas": 0, "max_replicas": 2}})
    await says(stack.addresses["router-0"], READINESS, SERVING)


async def test_a_stream_outlives_the_age_of_its_connection(start: Start, connect: Connect) -> None:
    router = {"max_connection_age_s": 1, "max_connection_age_grace_s": 30}
    stack = await start(replicas=1, step_time_ms=100.0, steps_per_canvas=5, router=router)
    client: EaselClient = connect(stack)
    answer = await client.generate(tokens=[2, 3], seed=1, max_new_tokens=128)
    assert answer.usage.canvases == 4
    # The connection is another by now.
    assert (await client.generate(tokens=[2, 3], seed=1, max_new_tokens=32)).usage.canvases == 1


def test_connections_have_no_age_unless_it_is_set() -> None:
    assert connection_age(0, 60) == []
    assert dict(connection_age(300, 60))["grpc.max_connection_age_grace_ms"] == 60_000
