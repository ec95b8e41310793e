"""Memory that each rank of a group takes to load its shard: the peak on the way, and what it keeps.

    python -m benchmarks.loading                        degrees 1, 2 and 4, about a minute

Writes a random bf16 checkpoint of about 400 MB to a temporary folder, and loads every shard of it in a fresh process,
one after another. `peak` and `kept` are private memory (what is resident and not a file's) above what the process had
before. `mapped` is the most of the weight files that it had in view: those pages are the machine's, shared by all
ranks, and taken back when memory is short. `shard` is the bytes of the rank's weights in the run dtype; on CPU the
embedding is kept three times, as it is and packed for the logits and for the self-conditioning. Prints a line per
rank, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.shapes import ROPES, WEIGHT_SPREAD, random_checkpoint
from cluster.checkpoint import Checkpoint, LayerConfig, ModelConfig, expected_tensors
from deployments.engine.torch_tp.shard import Shard
from deployments.engine.torch_tp.weights import load_weights

SHAPE = ModelConfig(
    vocab_size=32_768,
    canvas_tokens=64,
    hidden_size=768,
    intermediate_size=768,
    expert_intermediate_size=256,
    experts=32,
    experts_per_token=4,
    attention_heads=8,
    sliding_window_tokens=256,
    max_position_tokens=4096,
    rms_norm_eps=1e-6,
    logit_softcap=30.0,
    layers=((LayerConfig(True, 64, 4),) * 3 + (LayerConfig(False, 128, 4),)) * 2,
    **ROPES,
)
DEGREES = (1, 2, 4)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOOK_EVERY_S = 0.001


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one rank took, in bytes."""

    shard: int
    peak: int
    kept: int
    mapped: int


def write_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """Random bf16 weights of a shape in one file."""
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({name: _drawn(shape, generator) for name, shape in expected_tensors(config).items()}, file)
    drawn = random_checkpoint(config)
    return replace(drawn, tensors={name: replace(entry, file=file) for name, entry in drawn.tensors.items()})


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=WEIGHT_SPREAD, generator=generator)


class Watch(threading.Thread):
    """Looks at this process's memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.private = self.mapped = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            private, mapped = memory()
            self.private, self.mapped = max(self.private, private), max(self.mapped, mapped)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def memory() -> tuple[int, int]:
    """Private and file-backed resident bytes of this process."""
    info = psutil.Process().memory_info()
    return info.rss - info.shared, info.shared


def load_shard(checkpoint: Checkpoint, shard: Shard, dtype: torch.dtype) -> Loaded:
    """Loads one rank's part here; meant for a fresh process."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    # What the first product of a process sets up is not the model's.
    torch.randn(64, 256).to(dtype) @ torch.randn(256, 256).to(dtype)
    private, mapped = memory()
    watch = Watch()
    watch.start()
    weights = load_weights(checkpoint, dtype, cpu, shard)
    watch.stop()
    kept = memory()[0] - private
    assert len(weights.layers) == len(checkpoint.config.layers)
    return Loaded(
        shard=shard_elements(checkpoint.config, shard) * dtype.itemsize,
        peak=watch.private - private,
        kept=kept,
        mapped=watch.mapped - mapped,
    )


def shard_elements(config: ModelConfig, shard: Shard) -> int:
    """Matrix elements that a rank holds, the embedding once."""

    def part(size: int) -> int:
        cut = shard.cut(size)
        return int(cut.stop - cut.start)

    hidden, inner = config.hidden_size, part(config.intermediate_size)
    expert_inner, own = part(config.expert_intermediate_size), shard.config(config)
    attention = sum(
        hidden * layer.head_dim * (2 * own.attention_heads + layer.kv_heads * (2 if layer.is_sliding else 1))
        for layer in own.layers
    )
    layer = 3 * hidden * inner + config.experts * (3 * hidden * expert_inner + hidden)
    return attention + len(config.layers) * layer + 3 * hidden * inner + part(config.vocab_size) * hidden


def measure_loading(dtype: str = "bfloat16", degrees: tuple[int, ...] = DEGREES) -> dict[str, list[Loaded]]:
    """Every rank of every degree, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="easel-loading-") as folder:
        checkpoint = write_checkpoint(Path(folder), SHAPE)
        context = mp.get_context("spawn")
        measured: dict[str, list[Loaded]] = {}
        for world in degrees:
            measured[str(world)] = []
            for rank in range(world):
                with context.Pool(1) as pool:
                    arguments = (checkpoint, Shard(rank, world), DTYPES[dtype])
                    measured[str(world)].append(pool.apply(load_shard, arguments))
    return measured


def report(measured: dict[str, list[Loaded]]) -> str:
    """One line per rank, and the JSON line: the worst rank's ratios of each degree."""
    lines = [" ranks  rank   shard MB   peak MB   over shard   kept MB   over shard   mapped MB"]
    figures = {}
    for world, ranks in measured.items():
        lines += [
            f"{world:>6} {rank:>5} {one.shard / 1e6:10.1f} {one.peak / 1e6:9.1f} {one.peak / one.shard:12.2f} "
            f"{one.kept / 1e6:9.1f} {one.kept / one.shard:12.2f} {one.mapped / 1e6:11.1f}"
            for rank, one in enumerate(ranks)
        ]
        figures[f"loading_peak_over_shard_{world}"] = round(max(one.peak / one.shard for one in ranks), 2)
        figures[f"loading_kept_over_shard_{world}"] = round(max(one.kept / one.shard for one in ranks), 2)
    return "\n".join([*lines, json.dumps(figures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    print(report(measure_loading(parser.parse_args().dtype)))


if __name__ == "__main__":
    main()
