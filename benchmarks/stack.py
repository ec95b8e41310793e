"""What the stack costs: the same paced engine driven in this process, and behind Router, Redis, Denoiser and gRPC.

The fake engine takes 15 ms a step, the floor of one H100, so that what is measured is what stands around an engine.
Both sides run the same jobs in this run; the printed figures are ratios and differences between them.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from cluster import embedded
from cluster.checkpoint import read_checkpoint
from cluster.config import Settings, parse_settings
from cluster.core import ModelCard, SamplingParams
from cluster.rpc.easel.v1 import generation_pb2 as v1
from cluster.rpc.easel.v1 import generation_pb2_grpc as v1_grpc
from deployments.engine.api import EngineJob
from deployments.engine.fake import FakeEngine

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "tiny"
STEP_MS = 15.0
STEPS_PER_CANVAS = 16
SLOTS = 8
CANVASES = 6
ROUNDS = 6
PROBES = 40
PORT = 18_555


@dataclass(frozen=True)
class StackFigures:
    """Ratio of tokens/s with 8 slots full, added latency of a one-canvas request, CPU time per committed canvas."""

    stack_over_engine_8: float
    added_latency_p50_ms: float
    stack_cpu_ms_per_commit: float


def measure_stack() -> StackFigures:
    """Start a local cluster with the fake engine, load it, and compare it with the engine alone."""
    card = read_checkpoint(CHECKPOINT).card
    alone_tokens_per_s = engine_tokens_per_s(card)
    alone_ms = statistics.median(engine_latency_ms(card) for _ in range(PROBES // 4))
    with tempfile.TemporaryDirectory(prefix="easel-bench-") as home:
        os.environ["EASEL_HOME"] = home
        cluster = embedded.start(_settings(), own_redis=True, report=lambda line: print(f"  {line}", flush=True))
        try:
            return asyncio.run(_through_the_stack(cluster, card, alone_tokens_per_s, alone_ms))
        finally:
            embedded.down(lambda line: None)


def engine_tokens_per_s(card: ModelCard) -> float:
    """The engine driven in process, every slot refilled as soon as it is free."""
    engine = _engine(card)
    waiting = [_job(card, number, CANVASES) for number in range(SLOTS * ROUNDS)]
    done_tokens = 0
    start_s = time.perf_counter()
    while True:
        while waiting and engine.stats().active_jobs < SLOTS:
            engine.start(waiting.pop())
        if not engine.stats().active_jobs:
            break
        done_tokens += sum(len(commit.tokens) for commit in engine.step().commits)
    return done_tokens / (time.perf_counter() - start_s)


def engine_latency_ms(card: ModelCard) -> float:
    """One job of one canvas, alone."""
    engine = _engine(card)
    start_s = time.perf_counter()
    engine.start(_job(card, 0, 1))
    while not engine.step().commits:
        pass
    return (time.perf_counter() - start_s) * 1000


async def _through_the_stack(
    cluster: embedded.LocalCluster, card: ModelCard, alone_tokens_per_s: float, alone_ms: float
) -> StackFigures:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = v1_grpc.GenerationStub(channel)
        await _one(stub, card, 0, 1)
        latencies_ms = [await _one_latency_ms(stub, card, seed) for seed in range(PROBES)]
        processes = _processes(cluster)
        cpu_s, start_s = _cpu_s(processes), time.perf_counter()
        answers = await _loaded(stub, card)
        wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s(processes) - cpu_s
    tokens = sum(len(answer.token_ids) for answer in answers)
    canvases = sum(answer.usage.canvases for answer in answers)
    return StackFigures(
        stack_over_engine_8=tokens / wall_s / alone_tokens_per_s,
        added_latency_p50_ms=statistics.median(latencies_ms) - alone_ms,
        stack_cpu_ms_per_commit=cpu_s * 1000 / canvases,
    )


async def _loaded(stub: v1_grpc.GenerationAsyncStub, card: ModelCard) -> list[v1.GenerateResponse]:
    """8 callers, each asking again as soon as it is answered."""

    async def caller(first: int) -> list[v1.GenerateResponse]:
        return [await _one(stub, card, first + SLOTS * turn, CANVASES) for turn in range(ROUNDS)]

    return [answer for answers in await asyncio.gather(*map(caller, range(SLOTS))) for answer in answers]


async def _one_latency_ms(stub: v1_grpc.GenerationAsyncStub, card: ModelCard, seed: int) -> float:
    start_s = time.perf_counter()
    await _one(stub, card, seed, 1)
    return (time.perf_counter() - start_s) * 1000


async def _one(stub: v1_grpc.GenerationAsyncStub, card: ModelCard, seed: int, canvases: int) -> v1.GenerateResponse:
    sampling = v1.SamplingParams(seed=seed, max_new_tokens=canvases * card.canvas_tokens)
    return await stub.Generate(v1.GenerateRequest(token_ids=[5, 6, 7], sampling=sampling), timeout=120)


def _engine(card: ModelCard) -> FakeEngine:
    return FakeEngine(card, slots=SLOTS, steps_per_canvas=STEPS_PER_CANVAS, step_time_ms=STEP_MS)


def _job(card: ModelCard, number: int, canvases: int) -> EngineJob:
    defaults = card.defaults
    sampling = SamplingParams(
        seed=number,
        max_new_tokens=canvases * card.canvas_tokens,
        max_denoising_steps=defaults.max_denoising_steps,
        entropy_bound=defaults.entropy_bound,
        t_min=defaults.t_min,
        t_max=defaults.t_max,
        confidence_threshold=defaults.confidence_threshold,
        stability_threshold=defaults.stability_threshold,
    )
    return EngineJob(f"job-{number}", (5, 6, 7), sampling)


def _settings() -> Settings:
    return parse_settings(
        {
            "checkpoint": str(CHECKPOINT),
            "log_level": "WARNING",
            "router": {"port": PORT},
            "denoiser": {
                "engine": "fake",
                "replicas": 1,
                "slots": SLOTS,
                "fake_step_ms": STEP_MS,
                "fake_steps_per_canvas": STEPS_PER_CANVAS,
            },
        }
    )


def _processes(cluster: embedded.LocalCluster) -> list[psutil.Process]:
    """Redis, the Router and the Denoiser of the cluster: what is on a job's path, not Ray's own processes."""
    found = [psutil.Process(cluster.redis_pid)] if cluster.redis_pid is not None else []
    for process in psutil.Process(cluster.pid).children(recursive=True):
        if "ServeReplica" in " ".join(process.cmdline()):
            found.append(process)
    return found


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    print(json.dumps(measure_stack().__dict__))
