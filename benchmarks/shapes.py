"""Model shapes to measure without a checkpoint, what one denoising step of them must read and compute, and weights
that are drawn instead of read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint, LayerConfig, ModelConfig, RopeConfig, expected_tensors
from cluster.core import ModelCard, SamplingParams
from cluster.weight_files import TensorEntry
from deployments.engine.torch_tp import weights

BF16_BYTES = 2
WEIGHT_SPREAD = 0.02
FULL_LAYERS_26B = (5, 11, 17, 23, 29)
SLIDING, FULL = LayerConfig(True, 256, 8), LayerConfig(False, 512, 2)
ROPES = {"sliding_rope": RopeConfig(10_000.0, 1.0, 1.0), "full_rope": RopeConfig(1_000_000.0, 0.25, 1.0)}
SHAPE_26B = ModelConfig(
    vocab_size=262_144,
    canvas_tokens=256,
    hidden_size=2816,
    intermediate_size=2112,
    expert_intermediate_size=704,
    experts=128,
    experts_per_token=8,
    attention_heads=16,
    sliding_window_tokens=1024,
    max_position_tokens=131_072,
    rms_norm_eps=1e-6,
    logit_softcap=30.0,
    layers=tuple(FULL if index in FULL_LAYERS_26B else SLIDING for index in range(30)),
    **ROPES,
)
# As small as models/tiny, with more experts than are computed densely.
SHAPE_TINY = ModelConfig(
    vocab_size=128,
    canvas_tokens=32,
    hidden_size=128,
    intermediate_size=128,
    expert_intermediate_size=64,
    experts=24,
    experts_per_token=2,
    attention_heads=4,
    sliding_window_tokens=64,
    max_position_tokens=1024,
    rms_norm_eps=1e-6,
    logit_softcap=30.0,
    layers=(LayerConfig(True, 32, 2), LayerConfig(False, 64, 2)) * 2,
    **ROPES,
)
SHAPES = {"26b": SHAPE_26B, "tiny": SHAPE_TINY}


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a machine was measured to do: bytes copied (read plus written) and bf16 products, per second."""

    bytes_per_s: float
    flop_per_s: float

    def floor_ms(self, config: ModelConfig, canvases: int, context_tokens: int) -> float:
        """The least time of a step: all weights once, and all products of every canvas, whichever takes longer."""
        read_s = step_weight_bytes(config) / self.bytes_per_s
        computed_s = canvases * step_flop(config, context_tokens) / self.flop_per_s
        return 1000 * max(read_s, computed_s)


def step_weight_bytes(config: ModelConfig) -> int:
    """bf16 weights that a step reads, if its rows meet every expert.

    The embedding counts twice: it is read for the logits, and again for the self-conditioning embedding.
    """
    expert = 3 * config.hidden_size * config.expert_intermediate_size
    routed = len(config.layers) * (config.experts - config.experts_per_token) * expert
    return BF16_BYTES * (_weights_per_row(config) + routed)


def step_flop(config: ModelConfig, context_tokens: int) -> int:
    """Floating point operations of one canvas in one step, after `context_tokens` of context."""
    keys = {True: min(context_tokens, config.sliding_window_tokens), False: context_tokens}
    attention = sum(
        4 * config.attention_heads * layer.head_dim * (keys[layer.is_sliding] + config.canvas_tokens)
        for layer in config.layers
    )
    return config.canvas_tokens * (2 * _weights_per_row(config) + attention)


def _weights_per_row(config: ModelConfig) -> int:
    """Matrix elements that one row of a canvas is multiplied with."""
    hidden = config.hidden_size
    mlp, expert = 3 * hidden * config.intermediate_size, 3 * hidden * config.expert_intermediate_size
    layers = sum(
        hidden * layer.head_dim * (2 * config.attention_heads + layer.kv_heads * (2 if layer.is_sliding else 1))
        for layer in config.layers
    )
    layers += len(config.layers) * (mlp + config.experts_per_token * expert + hidden * config.experts)
    return layers + mlp + 2 * config.vocab_size * hidden


def random_checkpoint(config: ModelConfig) -> Checkpoint:
    """A checkpoint of no files; read it within `drawn_weights`."""
    sampling = SamplingParams(0, config.canvas_tokens, 48, 0.1, 0.4, 0.8, 1e-9, 1)
    card = ModelCard(
        name="random",
        version="random",
        vocab_size=config.vocab_size,
        canvas_tokens=config.canvas_tokens,
        max_context_tokens=config.max_position_tokens,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_ids=(1,),
        defaults=sampling,
    )
    nowhere = Path("drawn")
    entries = {name: TensorEntry(nowhere, "BF16", shape, 0, 0) for name, shape in expected_tensors(config).items()}
    return Checkpoint(nowhere, card, config, entries)


@contextmanager
def drawn_weights(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """Within it, the loader of the torch engine gets random bf16 tensors on `device` for those it would read.

    52 GB would take longer to write to disk and to read again than the measurement takes.
    """

    def open_nothing(*_: object, **__: object) -> _DrawnFile:
        return _DrawnFile(expected_tensors(config), device)

    with mock.patch.object(weights, "safe_open", open_nothing):
        yield


class _DrawnFile:
    """What the loader uses of a safetensors file."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device

    def __enter__(self) -> _DrawnFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        # Norm weights and scalars are near 1 in a trained model, and there no row outgrows the others.
        return drawn.fill_(1.0) if len(shape) < 2 else drawn.normal_(std=WEIGHT_SPREAD)

    def get_slice(self, name: str) -> Tensor:
        return self.get_tensor(name)


def transformers_config(config: ModelConfig) -> Any:  # noqa: ANN401 - transformers has no usable types
    """The same shape for transformers' classes."""
    from transformers import DiffusionGemmaConfig  # noqa: PLC0415 - dev only

    kinds = ["sliding_attention" if layer.is_sliding else "full_attention" for layer in config.layers]
    shapes = {layer.is_sliding: layer for layer in config.layers}
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.expert_intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": shapes[True].kv_heads,
        "head_dim": shapes[True].head_dim,
        "global_head_dim": shapes[False].head_dim,
        "num_global_key_value_heads": shapes[False].kv_heads,
        "layer_types": kinds,
        "sliding_window": config.sliding_window_tokens,
        "max_position_embeddings": config.max_position_tokens,
        "num_experts": config.experts,
        "top_k_experts": config.experts_per_token,
        "use_bidirectional_attention": "vision",
    }
    return DiffusionGemmaConfig(text_config=text, canvas_length=config.canvas_tokens)
