"""ms of a denoising step at the true 26B-A4B shape, random bf16 weights, next to this machine's roofline.

    python -m benchmarks.gpu_step                               one GPU of 80 GB, about 5 minutes
    python -m benchmarks.gpu_step --device cpu --shape tiny     the same code, small, in seconds

A step is one call of the engine's `step` with all canvases in the middle of denoising: forward, logits, sampler,
self-conditioning embedding, and what the host does. The floor is the larger of all weights at the measured copy
bandwidth and all products at the measured matmul rate. The engine runs twice: every step as it comes, and replayed as
a CUDA graph (on CPU there are none, so both are the same). transformers runs its decoder's forward and its logits, no
sampler. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import (
    SHAPES,
    Roofline,
    drawn_weights,
    random_checkpoint,
    step_flop,
    step_weight_bytes,
    transformers_config,
)
from cluster.checkpoint import ModelConfig
from deployments.engine.api import EngineJob
from deployments.engine.torch_tp.engine import EngineSettings, TorchEngine

NEEDS = "needs one CUDA GPU of 80 GB (an H100) and a CUDA build of torch; without: --device cpu --shape tiny"
CANVASES = (1, 2, 4, 8, 16)
WARM_STEPS = 3
# What DiffusionGemma's published 2.53 TFLOP a canvas and step are counted with.
CONTEXT_TOKENS = {"26b": 1024, "tiny": 64}
# Large enough to come from memory, not from a cache; small on a CPU, where the numbers do not matter.
COPY_ELEMENTS = {"cuda": 2**31, "cpu": 2**22}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True, slots=True)
class Measured:
    """Median ms of a step at some number of canvases; None where memory does not suffice."""

    eager_ms: dict[int, float | None]
    graphs_ms: dict[int, float | None]
    transformers_ms: dict[int, float | None]
    floor_ms: dict[int, float]
    roofline: Roofline


def measure(
    shape: str, device: torch.device, canvases: Sequence[int], steps: int, with_transformers: bool = True
) -> Measured:
    """Runs the engine without and with graphs, then transformers: their weights do not fit next to each other."""
    config, context = SHAPES[shape], CONTEXT_TOKENS[shape]
    with torch.inference_mode():
        roofline = measure_roofline(device)
        eager_ms = engine_steps(config, device, canvases, context, steps, cuda_graphs=False)
        _free(device)
        graphs_ms = engine_steps(config, device, canvases, context, steps, cuda_graphs=True)
        _free(device)
        transformers_ms: dict[int, float | None] = dict.fromkeys(canvases)
        if with_transformers:
            transformers_ms = transformers_steps(config, device, canvases, context, steps)
    floor_ms = {count: roofline.floor_ms(config, count, context) for count in canvases}
    return Measured(eager_ms, graphs_ms, transformers_ms, floor_ms, roofline)


def measure_roofline(device: torch.device) -> Roofline:
    """Copies and products as large as the device likes them."""
    source = torch.ones(COPY_ELEMENTS[device.type], dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source), device, 10)
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product_ms = _median_ms(lambda: left @ right, device, 10)
    moved_bytes = 2 * source.numel() * source.element_size()
    return Roofline(1000 * moved_bytes / copy_ms, 1000 * 2 * size**3 / product_ms)


def engine_steps(
    config: ModelConfig,
    device: torch.device,
    canvases: Sequence[int],
    context_tokens: int,
    steps: int,
    *,
    cuda_graphs: bool,
) -> dict[int, float | None]:
    """Median ms of the engine's step."""
    settings = EngineSettings(
        slots=max(canvases),
        dtype="bfloat16",
        device=device.type,
        max_context_tokens=context_tokens + 2 * config.canvas_tokens,
        prefix_reuse=False,
        cuda_graphs=cuda_graphs,
    )
    with drawn_weights(config, device):
        engine = TorchEngine(random_checkpoint(config), settings)
    return {
        count: _unless_out_of_memory(partial(_engine_ms, engine, count, context_tokens, device, steps))
        for count in canvases
    }


def _engine_ms(engine: TorchEngine, canvases: int, context_tokens: int, device: torch.device, steps: int) -> float:
    # More steps than are timed, and a confidence that no canvas reaches: nothing commits.
    sampling = replace(engine.card.defaults, max_denoising_steps=4 * (WARM_STEPS + steps) + 100)
    generator = torch.Generator().manual_seed(0)
    try:
        for number in range(canvases):
            prompt = torch.randint(2, engine.card.vocab_size, (context_tokens,), generator=generator).tolist()
            engine.start(EngineJob(str(number), tuple(prompt), replace(sampling, seed=number)))
        while len(engine.step().progress) < canvases:
            pass
        return _median_ms(engine.step, device, steps)
    finally:
        engine.close()


def transformers_steps(
    config: ModelConfig, device: torch.device, canvases: Sequence[int], context_tokens: int, steps: int
) -> dict[int, float | None]:
    """Median ms of transformers' decoder and logits, with self-conditioning, on a random dynamic cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = _transformers_decoder(config, device)
        return {
            count: _unless_out_of_memory(
                partial(_transformers_ms, decoder, config, count, context_tokens, device, steps)
            )
            for count in canvases
        }


def _transformers_decoder(config: ModelConfig, device: torch.device) -> Any:  # noqa: ANN401 - has no usable types
    """The decoder alone: next to an encoder it would be allocated twice before weights are tied."""
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference  # noqa: PLC0415 - dev only

    shape = transformers_config(config)
    # What from_pretrained chooses by itself.
    shape.text_config._attn_implementation = "sdpa"
    shape.text_config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        decoder: Any = reference.DiffusionGemmaDecoderModel(shape)
    decoder = decoder.to(torch.bfloat16)
    decoder.rotary_emb.float()
    decoder = decoder.to_empty(device=device).eval()
    for module in decoder.modules():
        decoder._init_weights(module)
    return decoder


def _transformers_ms(
    decoder: Any,  # noqa: ANN401
    config: ModelConfig,
    canvases: int,
    context_tokens: int,
    device: torch.device,
    steps: int,
) -> float:
    from transformers import DynamicCache  # noqa: PLC0415 - dev only

    cache = DynamicCache(config=decoder.config.get_text_config(decoder=True))
    for index, layer in enumerate(config.layers):
        shape = (canvases, layer.kv_heads, context_tokens, layer.head_dim)
        keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        cache.update(keys, values, index)
    canvas = torch.randint(2, config.vocab_size, (canvases, config.canvas_tokens), device=device)
    scores: list[Tensor | None] = [None]

    def step() -> None:
        output = decoder(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=scores[0])
        logits = output.last_hidden_state @ decoder.embed_tokens.weight.t()
        scores[0] = torch.tanh(logits.float() / config.logit_softcap) * config.logit_softcap

    return _median_ms(step, device, steps)


def _median_ms(call: Callable[[], object], device: torch.device, times: int) -> float:
    samples = []
    for number in range(WARM_STEPS + times):
        _synchronize(device)
        start_s = time.perf_counter()
        call()
        _synchronize(device)
        if number >= WARM_STEPS:
            samples.append(1000 * (time.perf_counter() - start_s))
    return statistics.median(samples)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _unless_out_of_memory(measured: Callable[[], float]) -> float | None:
    try:
        return measured()
    except torch.OutOfMemoryError:
        return None


def report(shape: str, measured: Measured) -> str:
    """The table, and the JSON line."""
    config, roofline = SHAPES[shape], measured.roofline
    lines = [
        f"shape {shape}: {step_weight_bytes(config) / 1e9:.3g} GB of weights a step, "
        f"{step_flop(config, CONTEXT_TOKENS[shape]) / 1e12:.3g} TFLOP a canvas and step",
        f"measured: copies {roofline.bytes_per_s / 1e12:.3g} TB/s, "
        f"bf16 products {roofline.flop_per_s / 1e12:.3g} TFLOP/s",
        "canvases   floor ms    eager ms   over floor    graphs ms   over floor   transformers ms   over floor",
    ]
    for count, floor_ms in measured.floor_ms.items():
        cells = [
            f"{'does not fit':>12} {'':>12}" if ms is None else f"{ms:12.2f} {ms / floor_ms:12.2f}"
            for ms in (measured.eager_ms[count], measured.graphs_ms[count], measured.transformers_ms[count])
        ]
        lines.append(f"{count:8} {floor_ms:10.2f} " + " ".join(cells))
    numbers = {
        str(count): {
            "floor_ms": floor_ms,
            "eager_ms": measured.eager_ms[count],
            "graphs_ms": measured.graphs_ms[count],
            "transformers_ms": measured.transformers_ms[count],
        }
        for count, floor_ms in measured.floor_ms.items()
    }
    return "\n".join([*lines, json.dumps(numbers)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="26b")
    parser.add_argument("--canvases", type=int, nargs="+", default=list(CANVASES))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each figure, whose median is printed")
    parser.add_argument("--without-transformers", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"gpu_step {NEEDS}")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(arguments.device)
    measured = measure(arguments.shape, device, arguments.canvases, arguments.steps, not arguments.without_transformers)
    print(report(arguments.shape, measured))


if __name__ == "__main__":
    main()
