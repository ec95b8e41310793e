"""A router and replicas in this process, on a real redis-server and real gRPC; only Ray is left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cluster.checkpoint import read_checkpoint
from cluster.client import EaselClient
from cluster.config import Settings, overlay, parse_settings
from cluster.engines import EngineTraits
from cluster.redis_server import RedisServer
from cluster.telemetry.telemetry import Telemetry
from deployments.engine.fake import FakeEngine
from deployments.replica import Replica
from deployments.router import Router
from deployments.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "tiny"
namespaces = count()


@dataclass
class Stack:
    """What a test of the stack holds: settings, engines by replica name, and how to reach the routers."""

    settings: Settings
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    routers: dict[str, Router] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    redis: RedisServer | None = None
    traits: EngineTraits | None = None
    engine: Callable[..., FakeEngine] = FakeEngine
    telemetry: Callable[[str], Telemetry] = field(default=lambda name: Telemetry())

    async def add_router(self, name: str, *, port: int = 0) -> str:
        settings = parse_settings(overlay(self.settings.model_dump(mode="json"), {"router": {"port": port}}))
        telemetry = self.telemetry(name)
        router = self.routers[name] = Router(settings, name=name, engine=self.traits, telemetry=telemetry)
        self.addresses[name] = f"127.0.0.1:{await router.start()}"
        return self.addresses[name]

    async def add_replica(self, name: str, **engine: float | None) -> Replica:
        checkpoint = Path(self.settings.checkpoint)
        card = read_checkpoint(checkpoint).card
        values: dict[str, Any] = {"slots": 2, "steps_per_canvas": 4, "step_time_ms": 5.0} | engine
        made = self.engine(card, **values)
        self.engines[name] = made
        replica = Replica(
            self.settings,
            made,
            Tokenizer(checkpoint).decode,
            name=name,
            advertised_host="127.0.0.1",
            telemetry=self.telemetry(name),
        )
        await replica.start()
        self.replicas[name] = replica
        return replica

    async def crash_router(self, name: str) -> None:
        """As SIGKILL leaves it: connections break, and nothing is written or said."""
        router = self.routers.pop(name)
        router._generation._left = lambda ticket: None  # type: ignore[method-assign]  # the dead cancel nothing
        for beat in (router._heartbeat, router._look):
            await beat.close()
        await router._doorbell.close()
        tasks = list(router._supervisor._tasks.values())
        for task in tasks:
            task.cancel()
        assert router._server is not None
        await router._server.stop(None)
        await asyncio.gather(*tasks, return_exceptions=True)
        await router._replicas.close()
        await router._store.close()

    async def close(self) -> None:
        for router in self.routers.values():
            await router.close()
        for replica in self.replicas.values():
            await replica.close()


Start = Callable[..., Awaitable[Stack]]
Connect = Callable[..., EaselClient]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may stop and kill."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest_asyncio.fixture
async def start(redis_server: RedisServer) -> AsyncIterator[Start]:
    """Start a router and replicas in a namespace of their own; the other arguments override settings.

    `engine_class` stands in for the fake engine, and `traits` for what the settings' engine can do.
    """
    async with AsyncExitStack() as stack:

        async def make(  # noqa: PLR0913 - most of them are sections of the settings
            *,
            replicas: int = 1,
            state: dict[str, Any] | None = None,
            denoiser: dict[str, Any] | None = None,
            router: dict[str, Any] | None = None,
            security: dict[str, Any] | None = None,
            checkpoint: Path = CHECKPOINT,
            traits: EngineTraits | None = None,
            engine_class: Callable[..., FakeEngine] = FakeEngine,
            telemetry: Callable[[str], Telemetry] = lambda name: Telemetry(),
            **engine: float | None,
        ) -> Stack:
            values = {
                "checkpoint": str(checkpoint),
                "state": {"url": redis_server.url, "namespace": f"t{next(namespaces)}", "heartbeat_ms": 100}
                | (state or {}),
                "router": {"port": 0, "drain_timeout_s": 0.2, "look_every_ms": 50} | (router or {}),
                "security": security or {},
                "denoiser": {"drain_timeout_s": 0.5} | (denoiser or {}),
            }
            made = Stack(
                parse_settings(values),
                redis=redis_server,
                traits=traits,
                engine=engine_class,
                telemetry=telemetry,
            )
            stack.push_async_callback(made.close)
            for number in range(replicas):
                await made.add_replica(f"denoiser-{number}", **engine)
            await made.add_router("router-0")
            return made

        yield make


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Connect]:
    """A client of a stack's first router, closed after the test."""
    async with AsyncExitStack() as stack:

        def make(target: Stack, *routers: str, **trust: Any) -> EaselClient:  # noqa: ANN401 - what the client takes
            names = routers or ("router-0",)
            client = EaselClient(",".join(target.addresses[name] for name in names), **trust)
            stack.push_async_callback(client.close)
            return client

        yield make


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Wait for a condition, with a bound; what is waited for is in another process or thread and sets no event."""
    async with asyncio.timeout(timeout_s):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.01)
