"""tokens/s through Easel over vLLM alone, in the same run: what Easel costs on a GPU.

    python -m benchmarks.gpu_vllm                      one GPU of 80 GB, `pip install easel[vllm]`; two starts of vLLM
    python -m benchmarks.gpu_vllm --quantization fp8
    python -m benchmarks.gpu_vllm --engine fake --shape tiny     the half through Easel, on any machine, in seconds

The model has the true shape of DiffusionGemma 26B-A4B and weights that vLLM makes up (load_format="dummy"). Every
canvas takes 16 denoising steps, because generation_config.json asks for a confidence that no canvas reaches. Prompts
are 1024 random tokens, answers 1024 tokens; 1, 4 and 8 callers each ask again as soon as they are answered.

First vLLM runs alone in a process of its own, as it comes, without Easel's plugin; when it is gone, a replica with the
vllm engine starts in a process of its own, next to a router and a redis-server, and the callers go through the router's
gRPC. Ray is left out: it places processes, and carries no job. The last line is one JSON object; the aim is a ratio of
at least 0.97.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.dummy_checkpoint import write_dummy_checkpoint
from benchmarks.offered import Recorded, Run, load, random_prompts
from benchmarks.shapes import SHAPES
from benchmarks.vllm_parts import HOST, MARK
from cluster.client import EaselClient
from cluster.redis_server import RedisServer

NEEDS_GPU = "gpu_vllm needs one CUDA GPU of 80 GB (an H100) and a CUDA build of torch; without: --engine fake"
NEEDS_VLLM = "gpu_vllm needs vllm: pip install 'easel[vllm]'; without: --engine fake"
AIM = 0.97
# What is asked of a shape by default: tokens in, tokens out, denoising steps of every canvas.
ASKED = {"26b": (1024, 1024, 16), "tiny": (64, 128, 4)}
# Compiling and capturing graphs takes vLLM minutes the first time.
START_TIMEOUT_S = 1800.0
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
LINE_LIMIT_BYTES = 2**20


class Part:
    """A process of vllm_parts. What it says with MARK is for us; the rest is a log, and goes to standard error."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process, self._name = process, name
        self._log: asyncio.Task[None] | None = None

    async def said(self, timeout_s: float) -> dict[str, Any]:
        """The next line for us. Raises SystemExit when the part ends or says nothing for so long."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                async for raw in self._process.stdout:
                    line = raw.decode(errors="replace")
                    if line.startswith(MARK):
                        message: dict[str, Any] = json.loads(line.removeprefix(MARK))
                        return message
                    print(line, end="", file=sys.stderr)
        except TimeoutError:
            raise SystemExit(f"gpu_vllm: the {self._name} said nothing for {timeout_s:g} s") from None
        raise SystemExit(f"gpu_vllm: the {self._name} ended with {await self._process.wait()}; its log is above")

    def follow_log(self) -> None:
        """From here on everything it says is a log: a pipe that nobody reads would stop it."""
        self._log = asyncio.create_task(self._drain())

    async def close(self) -> None:
        """Tell it to end, and wait; it is killed when that is not enough."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._log is not None:
            await self._log

    async def _drain(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            print(raw.decode(errors="replace"), end="", file=sys.stderr)


@asynccontextmanager
async def started(name: str, values: Mapping[str, Any], run: Run) -> AsyncIterator[Part]:
    """A part of this benchmark, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.vllm_parts", name, json.dumps(values), json.dumps(run.as_json())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_LIMIT_BYTES,
    )
    part = Part(process, name)
    try:
        yield part
    finally:
        await part.close()


async def measure_alone(values: Mapping[str, Any], run: Run) -> list[Recorded]:
    """vLLM without Easel, at every number of callers."""
    async with started("alone", values, run) as part:
        return [Recorded(**await part.said(START_TIMEOUT_S)) for _ in run.concurrent]


async def measure_easel(values: Mapping[str, Any], run: Run) -> list[Recorded]:
    """The same load through a router, Redis and a replica."""
    async with AsyncExitStack() as owned:
        folder = owned.enter_context(tempfile.TemporaryDirectory(prefix="easel-redis-"))
        redis = RedisServer(Path(folder))
        redis.start()
        owned.callback(redis.stop)
        values = {**values, "state": {"url": redis.url}}
        for name in ("replica", "router"):
            part = await owned.enter_async_context(started(name, values, run))
            ready = await part.said(START_TIMEOUT_S)
            part.follow_log()
        client = await owned.enter_async_context(EaselClient(f"{HOST}:{ready['ready']}"))
        await client.wait_ready(READY_TIMEOUT_S)
        return await _through(client, run)


async def _through(client: EaselClient, run: Run) -> list[Recorded]:
    prompts, ask = random_prompts(run), partial(_ask_easel, client, run)
    await load(ask, prompts[:1], 1)
    return [await load(ask, run.share(prompts, concurrent), concurrent) for concurrent in run.concurrent]


async def _ask_easel(client: EaselClient, run: Run, number: int, prompt: list[int]) -> Recorded:
    answer = await client.generate(tokens=prompt, seed=number, max_new_tokens=run.new_tokens)
    return Recorded(1, len(answer.token_ids), answer.usage.denoising_steps, 0.0)


def settings_for(folder: Path, run: Run, engine: str, tp: int) -> dict[str, Any]:
    """One replica with a slot for every caller, and room for one prompt and its answer in each."""
    context_tokens = run.prompt_tokens + run.canvases * run.canvas_tokens
    denoiser: dict[str, Any] = {
        "engine": engine,
        "slots": max(run.concurrent),
        "tp": tp,
        "max_context_tokens": context_tokens,
        "prefix_reuse": False,
        "step_timeout_s": 120.0,
    }
    if engine == "fake":
        denoiser |= {"fake_step_ms": 1.0, "fake_steps_per_canvas": run.steps}
    else:
        denoiser |= {"dtype": "bfloat16", "device": "cuda"}
    chosen = {"quantization": run.quantization, "enforce_eager": run.eager or None}
    if any(chosen.values()):
        denoiser["vllm"] = {name: value for name, value in chosen.items() if value is not None}
    return {"checkpoint": str(folder), "log_level": "WARNING", "router": {"port": 0}, "denoiser": denoiser}


def figures(alone: Sequence[Recorded], easel: Sequence[Recorded]) -> dict[str, float]:
    """Ratio of tokens/s by the number of callers."""
    paired = zip(alone, easel, strict=True)
    return {f"easel_over_vllm_{ours.concurrent}": ours.tokens_per_s / theirs.tokens_per_s for theirs, ours in paired}


def odd_answers(run: Run, recorded: Sequence[Recorded]) -> list[str]:
    """Where not every answer had its whole length, or its steps where they are told: what is compared is not equal."""
    lines = []
    for row in recorded:
        requests = run.rounds * row.concurrent
        tokens, steps = requests * run.new_tokens, requests * run.canvases * run.steps
        if row.tokens != tokens or row.denoising_steps not in (None, steps):
            made = f"{row.tokens} tokens in {row.denoising_steps or 'untold'} steps"
            lines.append(f"{row.concurrent} callers: {made}, not {tokens} in {steps}: an answer ended early")
    return lines


def report(run: Run, alone: Sequence[Recorded], easel: Sequence[Recorded]) -> str:
    """The table, what is odd about it, and the JSON line; without `alone`, of Easel only."""
    lines = ["callers   vLLM alone tokens/s   through Easel tokens/s   ratio"]
    ratios = figures(alone, easel) if alone else {}
    for index, row in enumerate(easel):
        theirs = f"{alone[index].tokens_per_s:19.1f}" if alone else f"{'not run':>19}"
        ratio = f"{ratios[f'easel_over_vllm_{row.concurrent}']:7.3f}" if alone else f"{'':7}"
        lines.append(f"{row.concurrent:7}   {theirs}   {row.tokens_per_s:22.1f} {ratio}")
    lines += [*odd_answers(run, alone), *odd_answers(run, easel)]
    if ratios:
        lines.append(f"the aim is {AIM}: {'met' if min(ratios.values()) >= AIM else 'not met'}")
    numbers = {f"easel_tokens_per_s_{row.concurrent}": round(row.tokens_per_s, 1) for row in easel}
    return "\n".join([*lines, json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()} | numbers)])


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "fake"), default="vllm")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="26b")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 8], help="numbers of callers")
    parser.add_argument("--rounds", type=int, default=3, help="requests of every caller")
    parser.add_argument("--prompt-tokens", type=int, help="1024 for the shape 26b")
    parser.add_argument("--new-tokens", type=int, help="1024 for the shape 26b")
    parser.add_argument("--steps", type=int, help="denoising steps of every canvas, 16 for the shape 26b")
    parser.add_argument("--quantization", help="how vLLM quantises the weights, on both sides: fp8")
    parser.add_argument("--eager", action="store_true", help="no compiling and no CUDA graphs, on both sides")
    parser.add_argument("--tp", type=int, default=1, help="ranks, on both sides")
    arguments = parser.parse_args(given)
    for name, asked in zip(("prompt_tokens", "new_tokens", "steps"), ASKED[arguments.shape], strict=True):
        setattr(arguments, name, asked if getattr(arguments, name) is None else getattr(arguments, name))
    counts = (*arguments.concurrent, arguments.rounds, arguments.prompt_tokens, arguments.new_tokens, arguments.steps)
    if min(counts) < 1 or sorted(set(arguments.concurrent)) != arguments.concurrent:
        parser.error("all numbers must be at least 1, and those of --concurrent must rise")
    return arguments


def run_of(arguments: argparse.Namespace) -> Run:
    config = SHAPES[arguments.shape]
    return Run(
        concurrent=tuple(arguments.concurrent),
        rounds=arguments.rounds,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        steps=arguments.steps,
        vocab_size=config.vocab_size,
        canvas_tokens=config.canvas_tokens,
        quantization=arguments.quantization,
        eager=arguments.eager,
    )


def main() -> None:
    arguments = parse_arguments()
    if arguments.engine == "vllm" and not torch.cuda.is_available():
        raise SystemExit(NEEDS_GPU)
    if arguments.engine == "vllm" and find_spec("vllm") is None:
        raise SystemExit(NEEDS_VLLM)
    run = run_of(arguments)
    with tempfile.TemporaryDirectory(prefix="easel-dummy-") as folder:
        write_dummy_checkpoint(Path(folder), SHAPES[arguments.shape], run.steps)
        values = settings_for(Path(folder), run, arguments.engine, arguments.tp)
        alone = asyncio.run(measure_alone(values, run)) if arguments.engine == "vllm" else []
        easel = asyncio.run(measure_easel(values, run))
    print(report(run, alone, easel))


if __name__ == "__main__":
    main()
