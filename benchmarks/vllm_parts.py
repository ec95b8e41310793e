"""The processes that benchmarks/gpu_vllm.py starts, one part each: vLLM alone, a router, a replica.

A part says on its standard output that it is ready, or what it measured, in lines that begin with MARK, for vLLM writes
its log there too; it ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.offered import Recorded, Run, load, random_prompts
from cluster.config import Settings, parse_settings
from deployments.replica import Replica
from deployments.router import Router
from deployments.tokenizer import Tokenizer

MARK = "gpu_vllm: "
HOST = "127.0.0.1"


def say(**message: Any) -> None:  # noqa: ANN401 - JSON
    """One line to whoever started this part."""
    print(MARK + json.dumps(message), flush=True)


@contextmanager
def made_up_weights() -> Iterator[None]:
    """Within it, vLLM draws its weights instead of reading them, whoever starts it in this process."""
    arguments: Any = import_module("vllm.engine.arg_utils")
    dummy = partial(arguments.AsyncEngineArgs, load_format="dummy")
    with mock.patch.object(arguments, "AsyncEngineArgs", dummy):
        yield


def run_alone(settings: Settings, run: Run) -> None:
    """vLLM as it comes, without Easel's plugin, under the same load."""
    os.environ["VLLM_PLUGINS"] = ""
    asyncio.run(_alone(settings, run))


async def _alone(settings: Settings, run: Run) -> None:
    arguments: Any = import_module("vllm.engine.arg_utils")
    engine: Any = import_module("vllm.v1.engine.async_llm")
    llm = engine.AsyncLLM.from_engine_args(arguments.AsyncEngineArgs(**vllm_arguments(settings, run)))
    try:
        prompts = random_prompts(run)
        await load(partial(_ask_vllm, llm, run), prompts[:1], 1)
        for concurrent in run.concurrent:
            recorded = await load(partial(_ask_vllm, llm, run), run.share(prompts, concurrent), concurrent)
            say(**recorded.as_json())
    finally:
        llm.shutdown()


def vllm_arguments(settings: Settings, run: Run) -> dict[str, Any]:
    """The same model, memory and batch as the replica's."""
    denoiser = settings.denoiser
    return {
        "model": settings.checkpoint,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "dtype": denoiser.dtype,
        "quantization": run.quantization,
        "enforce_eager": run.eager,
        "max_model_len": denoiser.max_context_tokens,
        "max_num_seqs": denoiser.slots,
        "enable_prefix_caching": False,
        "tensor_parallel_size": denoiser.tp,
        "disable_log_stats": True,
    }


async def _ask_vllm(llm: Any, run: Run, number: int, prompt: list[int]) -> Recorded:  # noqa: ANN401 - no types here
    vllm: Any = import_module("vllm")
    params = vllm.SamplingParams(temperature=1.0, max_tokens=run.new_tokens, ignore_eos=True, detokenize=False)
    last: Any = None
    async for output in llm.generate({"prompt_token_ids": prompt}, params, request_id=f"alone-{number}-{id(prompt)}"):
        last = output
    return Recorded(1, len(last.outputs[0].token_ids), None, 0.0)


async def _replica(settings: Settings) -> None:
    from deployments.app import make_engine  # noqa: PLC0415 - it brings Ray along, which nothing else here needs

    vllm = settings.denoiser.engine not in ("fake", "torch")
    loop = asyncio.get_running_loop()
    with made_up_weights() if vllm else nullcontext():
        engine = await loop.run_in_executor(None, make_engine, settings, None)
    decode = Tokenizer(Path(settings.checkpoint)).decode
    replica = Replica(settings, engine, decode, name="denoiser-0", advertised_host=HOST)
    await _serve(replica.start, replica.close)


async def _router(settings: Settings) -> None:
    router = Router(settings, name="router-0")
    await _serve(router.start, router.close)


async def _serve(
    start: Callable[[], Coroutine[Any, Any, object]], close: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Until whoever started this part closes its standard input, or is gone."""
    try:
        say(ready=await start())
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    finally:
        await close()


PARTS: dict[str, Callable[[Settings, Run], None]] = {
    "alone": run_alone,
    "replica": lambda settings, run: asyncio.run(_replica(settings)),
    "router": lambda settings, run: asyncio.run(_router(settings)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("run", type=json.loads)
    arguments = parser.parse_args()
    PARTS[arguments.part](parse_settings(arguments.settings), Run.from_json(arguments.run))


if __name__ == "__main__":
    main()
