"""How far vLLM's scores are off where the sliding window is shorter than the context and a canvas.

Run in the environment of `make test-vllm`, and without a GPU with its bootstrap:

    PYTHONPATH=.:tests/vllm/site .venv-vllm/bin/python -m benchmarks.vllm_window [CHECKPOINT ...]

Both score the same canvas of random tokens after the same context: vLLM as it is, without Easel's plugin, and the torch
engine's model, which tests hold to the reference. What is printed is over all contexts of one length.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint, read_checkpoint
from tests.oracle import CHECKPOINTS, TileRunner

CONTEXTS = 6
# Context lengths in canvases beyond what the window holds besides a canvas.
BEYOND = (-0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
FIRST_TEXT_TOKEN = 32


@dataclass(frozen=True, slots=True)
class Off:
    """Of one context length: scores of `rows` positions, in logits, and how many have another best token."""

    context_tokens: int
    largest: float
    mean: float
    other_best: int
    rows: int


class PlainVllm:
    """vLLM in this process, one step at a time, and the scores of the step."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import vllm  # noqa: PLC0415 - after the environment is set

        self._vllm = vllm
        self._llm = vllm.LLM(
            model=str(checkpoint.path),
            dtype="float32",
            skip_tokenizer_init=True,
            limit_mm_per_prompt={"image": 0, "video": 0},
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_num_batched_tokens=checkpoint.card.max_context_tokens,
            diffusion_config={"canvas_length": checkpoint.card.canvas_tokens},
        )
        executor: Any = self._llm.llm_engine.model_executor
        self._model = executor.driver_worker.worker.get_model()
        self._scores: list[Tensor] = []
        compute = self._model.compute_logits

        def record(hidden: Tensor) -> Tensor:
            logits: Tensor = compute(hidden)
            self._scores += [logits.clone()] if len(logits) else []
            return logits

        self._model.compute_logits = record

    def logits(self, context: list[int], canvas: list[int]) -> Tensor:
        """float32 [rows, vocab] of the first step of `canvas` after `context`."""
        self._scores.clear()
        extra = {"diffusion_seed_canvas": canvas, "diffusion_max_steps": 1, "diffusion_read_only": True}
        params = self._vllm.SamplingParams(max_tokens=len(canvas), detokenize=False, extra_args=extra)
        self._llm.generate([{"prompt_token_ids": context}], params, use_tqdm=False)
        return self._scores[0]


def measure(checkpoint: Checkpoint) -> list[Off]:
    """One row for each context length that the model has room for."""
    canvas_tokens, draw = checkpoint.card.canvas_tokens, random.Random(0)
    plain = PlainVllm(checkpoint)
    found = []
    for beyond in BEYOND:
        length = checkpoint.config.sliding_window_tokens - canvas_tokens + int(beyond * canvas_tokens)
        if not 0 < length <= checkpoint.card.max_context_tokens - canvas_tokens:
            continue
        ours, theirs = [], []
        for _ in range(CONTEXTS):
            context, canvas = ([_token(draw, checkpoint) for _ in range(n)] for n in (length, canvas_tokens))
            theirs.append(plain.logits(context, canvas))
            ours.append(TileRunner(checkpoint).logits(context, np.array(canvas)))
        found.append(_compare(length, torch.cat(ours), torch.cat(theirs)))
    return found


def _token(draw: random.Random, checkpoint: Checkpoint) -> int:
    return draw.randrange(FIRST_TEXT_TOKEN, checkpoint.card.vocab_size)


def _compare(length: int, ours: Tensor, theirs: Tensor) -> Off:
    off = (ours - theirs).abs()
    other = int((ours.argmax(dim=-1) != theirs.argmax(dim=-1)).sum())
    return Off(length, float(off.max()), float(off.mean()), other, len(ours))


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = ""
    for path in paths or [str(path) for path in CHECKPOINTS if Path(path).is_dir()]:
        checkpoint = read_checkpoint(path)
        config, card = checkpoint.config, checkpoint.card
        print(f"{path}: window {config.sliding_window_tokens}, canvas {card.canvas_tokens} tokens")
        print("  context  largest difference  mean difference  other best token")
        for off in measure(checkpoint):
            share = off.other_best / off.rows
            print(f"  {off.context_tokens:7}  {off.largest:18.6f}  {off.mean:15.6f}  {share:15.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
