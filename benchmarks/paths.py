"""Router to Denoiser, two ways: a Serve deployment handle, and a gRPC server inside the replica, dialled directly.

A stream of 4 messages of 1 KiB, client -> Router replica -> Denoiser replica -> back. Prints, for both paths, the
median of a stream alone, streams per second at 64, how long after the client's deadline the replica knows of it, and
how long after a SIGKILL of the replica the router knows. The last line is one JSON object with the ratios, handle over
direct.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

MESSAGE = b"x" * 1024
MESSAGES = 4
ALONE = 100
AT_ONCE = 64
STREAMS = 512
DEADLINE_S = 0.5
METHOD = "/bench.Path/Stream"
OPTIONS = {"num_cpus": 0.1}


async def _messages(pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(MESSAGES):
        yield MESSAGE
        if pause_s:
            await asyncio.sleep(pause_s)


async def _serve(stream: Any) -> tuple[grpc.aio.Server, int]:  # noqa: ANN401 - an untyped gRPC handler
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Path", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


@serve.deployment(ray_actor_options=OPTIONS, max_ongoing_requests=1000)
class Denoiser:
    """Streams the messages on both paths."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        self._cancelled_at_s = 0.0
        self._server, self._port = await _serve(self._grpc)

    async def port(self) -> int:
        return self._port

    async def pid(self) -> int:
        return os.getpid()

    async def cancelled_at_s(self) -> float:
        """When a stream was last cancelled here, on the machine's clock; 0 when none was."""
        return self._cancelled_at_s

    async def stream(self, request: bytes) -> AsyncIterator[bytes]:
        try:
            async for message in _messages(1.0 if request == b"slow" else 0.0):
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled_at_s = time.time()
            raise

    async def _grpc(self, request: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401
        del context
        async for message in self.stream(request):
            yield message


@serve.deployment(ray_actor_options=OPTIONS, max_ongoing_requests=1000)
class Router:
    """Passes a stream on, by the path that the request names."""

    async def __init__(self, denoiser: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._handle = denoiser.options(stream=True)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{await denoiser.port.remote()}")
        self._direct: Any = self._channel.unary_stream(METHOD)
        self._denoiser = denoiser
        self._pid = await denoiser.pid.remote()
        self._server, self._port = await _serve(self._grpc)

    async def port(self) -> int:
        return self._port

    async def cancelled_at_s(self) -> float:
        return float(await self._denoiser.cancelled_at_s.remote())

    async def kill_seen_after_ms(self, path: str) -> float:
        """SIGKILL the replica in the middle of a slow stream; how long until the stream breaks here."""
        stream = self._stream(path, b"slow")
        await anext(stream)
        os.kill(self._pid, signal.SIGKILL)
        start_s = time.perf_counter()
        try:
            async for _ in stream:
                pass
        except Exception:  # noqa: BLE001 - whatever the path raises is the signal that is timed
            return (time.perf_counter() - start_s) * 1000
        raise RuntimeError("the stream ended well although its replica was killed")

    async def _grpc(self, request: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401
        path, _, pace = request.decode().partition(" ")
        async for message in self._stream(path, pace.encode(), context.time_remaining()):
            yield message

    async def _stream(self, path: str, pace: bytes, timeout_s: float | None = None) -> AsyncIterator[bytes]:
        """A handle takes no deadline; a gRPC call does."""
        source: Any = self._handle.stream.remote(pace) if path == "handle" else self._direct(pace, timeout=timeout_s)
        async for message in source:
            yield message


def _deploy() -> DeploymentHandle[Any]:
    application = Router.bind(Denoiser.bind())  # type: ignore[attr-defined]  # the decorator makes a Deployment
    return serve.run(application, name="paths", route_prefix=None)


async def _drain(call: Any, path: str) -> float:  # noqa: ANN401 - an untyped gRPC call
    start_s = time.perf_counter()
    async for _ in call(f"{path} fast".encode()):
        pass
    return (time.perf_counter() - start_s) * 1000


async def _measure(port: int, path: str) -> tuple[float, float]:
    """(median ms of a stream alone, streams per second at AT_ONCE)."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_stream(METHOD)
        await _drain(call, path)
        alone_ms = statistics.median([await _drain(call, path) for _ in range(ALONE)])
        start_s = time.perf_counter()

        async def caller() -> None:
            for _ in range(STREAMS // AT_ONCE):
                await _drain(call, path)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        return alone_ms, STREAMS / (time.perf_counter() - start_s)


async def _deadline_seen_after_ms(port: int, path: str, router: DeploymentHandle[Any]) -> float:
    """How long after the client's deadline the replica's stream was cancelled; infinite when it was not."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_stream(METHOD)
        due_s = time.time() + DEADLINE_S
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call(f"{path} slow".encode(), timeout=DEADLINE_S):
                pass
    await asyncio.sleep(DEADLINE_S)
    seen_s = float(await router.cancelled_at_s.remote())
    return (seen_s - due_s) * 1000 if seen_s >= due_s else math.inf


def main() -> None:
    """Deploy, measure both paths in turn, print the table and the ratios."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    figures: dict[str, tuple[float, float, float, float]] = {}
    for path in ("handle", "direct"):
        router = _deploy()
        port = router.port.remote().result(timeout_s=30)
        alone_ms, per_s = asyncio.run(_measure(port, path))
        deadline_ms = asyncio.run(_deadline_seen_after_ms(port, path, router))
        killed_ms = router.kill_seen_after_ms.remote(path).result(timeout_s=30)
        figures[path] = (alone_ms, per_s, killed_ms, deadline_ms)
        deadline = "never" if math.isinf(deadline_ms) else f"after {deadline_ms:.1f} ms"
        print(f"{path:<7} p50 alone {alone_ms:6.2f} ms, {per_s:6.0f} streams/s at {AT_ONCE}", flush=True)
        print(f"{'':<7} deadline seen {deadline}, SIGKILL seen after {killed_ms:.1f} ms", flush=True)
        serve.delete("paths")
    serve.shutdown()
    ray.shutdown()
    names = ("latency_handle_over_direct", "throughput_handle_over_direct", "kill_seen_handle_over_direct")
    ratios = (handle / direct for handle, direct in zip(figures["handle"][:3], figures["direct"][:3], strict=True))
    print(json.dumps({name: round(ratio, 3) for name, ratio in zip(names, ratios, strict=True)}))


if __name__ == "__main__":
    main()
