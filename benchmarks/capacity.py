"""How much a replica can do at best: the floor of a denoising step on each GPU, for planning.

python -m benchmarks.capacity [--steps-per-canvas 26.6] [--tp 1,2,4] [--canvases-per-s 10]

DiffusionGemma 26B-A4B in bfloat16: a step reads 52.0 GB of weights, however many canvases are in it, and computes
2.53 TFLOP for each canvas. A step takes at least the longer of both; ranks share both evenly, and what they send each
other is left out. Nothing real reaches the floor: `over_one` tells what more canvases gain, whatever share is reached.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHT_BYTES = 52.0e9
FLOP_PER_CANVAS = 2.53e12
CANVAS_TOKENS = 256
# Mean over the 2,115 published blocks.
STEPS_PER_CANVAS = 26.6
# Keys and values in bfloat16: 25 sliding layers of 8 heads of 256, 5 full ones of 2 heads of 512.
KV_BYTES_PER_TOKEN = 2 * 2 * (25 * 8 * 256 + 5 * 2 * 512)
CANVASES = (1, 2, 4, 8, 16)
# A queue in front of replicas that are busier than this grows long whenever requests come in bursts.
BUSY = 0.7


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's data sheet; bfloat16 products without sparsity."""

    name: str
    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float


GPUS = (
    Gpu("A100 80GB SXM", 2.039e12, 312e12, 80e9),
    Gpu("H100 SXM", 3.35e12, 989e12, 80e9),
    Gpu("H200 SXM", 4.8e12, 989e12, 141e9),
    Gpu("B200", 8.0e12, 2250e12, 180e9),
)


def step_floor_ms(gpu: Gpu, tp: int, canvases: int) -> float:
    """The least time of a step of `canvases` canvases on `tp` GPUs, in ms."""
    return 1000 * max(WEIGHT_BYTES / gpu.bytes_per_s, canvases * FLOP_PER_CANVAS / gpu.flop_per_s) / tp


def canvases_per_s(gpu: Gpu, tp: int, canvases: int, steps_per_canvas: float) -> float:
    """The most canvases that a replica ends in a second with so many in every step."""
    return 1000 * canvases / (step_floor_ms(gpu, tp, canvases) * steps_per_canvas)


def useful_slots(gpu: Gpu) -> float:
    """Canvases from which on a step is bound by compute: more only make each of them slower."""
    return (WEIGHT_BYTES / gpu.bytes_per_s) / (FLOP_PER_CANVAS / gpu.flop_per_s)


def replicas_for(rate: float, per_replica: float) -> int:
    """Replicas for a rate of canvases a second, no busier than BUSY."""
    return max(1, math.ceil(rate / (BUSY * per_replica)))


def kv_tokens(gpu: Gpu, tp: int) -> int:
    """Tokens of context, over all slots, for which the memory beside the weights has room; a tenth is left free."""
    return max(0, int((0.9 * tp * gpu.memory_bytes - WEIGHT_BYTES) / KV_BYTES_PER_TOKEN))


def table(degrees: Sequence[int], steps_per_canvas: float, rate: float) -> list[str]:
    """The lines to print: a row for each GPU and degree that holds the weights."""
    head = "".join(f"{f'{count} canvases':>13}" for count in CANVASES)
    lines = [f"ms a step at best, and canvases/s of a replica at {steps_per_canvas:g} steps a canvas", ""]
    lines.append(f"{'GPU':<14}{'tp':>3}{head}{'useful slots':>14}{'KV tokens':>11}{f'replicas for {rate:g}/s':>20}")
    for gpu in GPUS:
        for tp in degrees:
            if kv_tokens(gpu, tp) == 0:
                continue
            cells = "".join(_cell(gpu, tp, count, steps_per_canvas) for count in CANVASES)
            best = canvases_per_s(gpu, tp, 8, steps_per_canvas)
            places = f"{useful_slots(gpu):>14.1f}{kv_tokens(gpu, tp):>11,}{replicas_for(rate, best):>20}"
            lines.append(f"{gpu.name:<14}{tp:>3}{cells}{places}")
    return lines


def _cell(gpu: Gpu, tp: int, canvases: int, steps_per_canvas: float) -> str:
    step_ms = step_floor_ms(gpu, tp, canvases)
    return f"{f'{step_ms:.1f} / {canvases_per_s(gpu, tp, canvases, steps_per_canvas):.2f}':>13}"


def over_one(gpu: Gpu) -> dict[int, float]:
    """Canvases in a step -> canvases/s over those with one in a step."""
    one = canvases_per_s(gpu, 1, 1, 1.0)
    return {count: round(canvases_per_s(gpu, 1, count, 1.0) / one, 2) for count in CANVASES}


def main() -> None:
    """Print the table; the last line is one JSON object of ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps-per-canvas", type=float, default=STEPS_PER_CANVAS)
    parser.add_argument("--tp", default="1,2,4", help="tensor-parallel degrees, with commas between")
    parser.add_argument("--canvases-per-s", type=float, default=10.0, help="what all replicas together must end")
    given = parser.parse_args()
    degrees = [int(degree) for degree in given.tp.split(",")]
    print("\n".join(table(degrees, given.steps_per_canvas, given.canvases_per_s)))
    print(f"\na token of context takes {KV_BYTES_PER_TOKEN:,} bytes; replicas are to be {BUSY:.0%} busy, 8 slots each")
    print(json.dumps({"over_one": {gpu.name: over_one(gpu) for gpu in GPUS}}))


if __name__ == "__main__":
    main()
