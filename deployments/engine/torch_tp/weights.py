"""Loads a checkpoint into the fused form that the forward uses, tensor by tensor.

Fused once, in float32, before the cast to the run dtype: q, k and v into one matrix; gate and up into one; the norm
before a matrix into its columns; the router's scale and hidden^-0.5 into its matrix; the experts' per-expert scale
into their down matrix; the layer's scalar into its last norm. Heads are reordered for `rotary.rotate`.
`Shard` is where tensor parallelism will cut; today there is one rank and nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.checkpoint import Checkpoint, LayerConfig, ModelConfig
from deployments.engine.torch_tp.experts import (
    MAX_DENSE_EXPERTS,
    DenseFeedForward,
    FeedForward,
    RoutedFeedForward,
)
from deployments.engine.torch_tp.linear import TileLinear
from deployments.engine.torch_tp.rotary import pair_order

Get = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every matrix a process holds."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norm weights are float32 [hidden]; `head_norm` is float32 [q_heads + kv_heads, head_dim].

    `value_head` is where, among the normed heads of `qkv`, the values start: on full-attention layers they are the
    keys' heads, before weight and rotation. `branch_norms` [2, 1, 1, hidden] follow the feed-forward's branches.
    """

    shape: LayerConfig
    query_heads: int
    value_head: int
    qkv: TileLinear
    head_norm: Tensor
    out: TileLinear
    post_attention_norm: Tensor
    feed_forward: FeedForward
    branch_norms: Tensor
    post_norm: Tensor
    scalar: float


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole model. `embedding` is [vocab, hidden] in the run dtype and shared with `head` on CUDA."""

    embedding: Tensor
    head: TileLinear
    soft_embedding: TileLinear
    condition_up: TileLinear
    condition_down: TileLinear
    final_norm: Tensor
    layers: tuple[LayerWeights, ...]


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> ModelWeights:
    """Reads every tensor once; the peak is the finished model plus one layer in float32 on the host."""
    shard = shard or Shard()
    if shard.world != 1:
        raise NotImplementedError(f"tensor parallelism over {shard.world} ranks")
    with _OpenFiles() as files:

        def get(name: str) -> Tensor:
            return files.tensor(checkpoint.tensors[name].file, name).float()

        return _Loader(checkpoint.config, get, dtype, device).model()


class _OpenFiles:
    """Memory-maps each shard file once, and closes them all."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)

    def tensor(self, file: Path, name: str) -> Tensor:
        if file not in self._files:
            self._files[file] = safe_open(str(file), framework="pt").__enter__()
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor


class _Loader:
    def __init__(self, config: ModelConfig, get: Get, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._get, self._dtype, self._device = config, get, dtype, device

    def model(self) -> ModelWeights:
        get, prefix = self._get, "model.decoder.self_conditioning"
        embedding = get("model.decoder.embed_tokens.weight").to(self._device, self._dtype)
        up = torch.cat((get(f"{prefix}.gate_proj.weight"), get(f"{prefix}.up_proj.weight")))
        return ModelWeights(
            embedding=embedding,
            head=TileLinear(embedding),
            soft_embedding=TileLinear(embedding.t()),
            condition_up=self._linear(up * get(f"{prefix}.pre_norm.weight")),
            condition_down=self._linear(get(f"{prefix}.down_proj.weight")),
            final_norm=self._vector(get("model.decoder.norm.weight")),
            layers=tuple(self._layer(index, shape) for index, shape in enumerate(self._config.layers)),
        )

    def _linear(self, weight: Tensor) -> TileLinear:
        return TileLinear(weight.to(self._device, self._dtype))

    def _vector(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, torch.float32)

    def _layer(self, index: int, shape: LayerConfig) -> LayerWeights:
        def get(name: str) -> Tensor:
            return self._get(f"model.decoder.layers.{index}.{name}")

        scalar = float(get("layer_scalar"))
        query_heads, kv_heads = self._config.attention_heads, shape.kv_heads
        norms = [get(f"post_feedforward_layernorm_{branch}.weight") for branch in (1, 2)]
        return LayerWeights(
            shape=shape,
            query_heads=query_heads,
            value_head=query_heads + (kv_heads if shape.is_sliding else 0),
            qkv=self._linear(_fused_qkv(get, shape)),
            head_norm=self._vector(_head_norm(get, query_heads, shape)),
            out=self._linear(_out(get, shape)),
            post_attention_norm=self._vector(get("post_attention_layernorm.weight")),
            feed_forward=self._feed_forward(get),
            branch_norms=self._vector(torch.stack(norms)[:, None, None]),
            post_norm=self._vector(get("post_feedforward_layernorm.weight") * scalar),
            scalar=scalar,
        )

    def _feed_forward(self, get: Get) -> FeedForward:
        config = self._config
        norm = get("pre_feedforward_layernorm.weight")
        gate, up = get("mlp.gate_proj.weight") * norm, get("mlp.up_proj.weight") * norm
        down = get("mlp.down_proj.weight")
        router = get("router.proj.weight") * (get("router.scale") * config.hidden_size**-0.5)
        experts_up = get("experts.gate_up_proj") * get("pre_feedforward_layernorm_2.weight")
        experts_down = get("experts.down_proj") * get("router.per_expert_scale")[:, None, None]
        if config.experts > MAX_DENSE_EXPERTS:
            return RoutedFeedForward(
                self._linear(torch.cat((gate, up))),
                self._linear(down),
                TileLinear(router.to(self._device)),
                experts_up.to(self._device, self._dtype),
                experts_down.to(self._device, self._dtype),
                config.experts_per_token,
            )
        expert_gates, expert_ups = (half.flatten(0, 1) for half in experts_up.chunk(2, dim=1))
        return DenseFeedForward(
            self._linear(torch.cat((gate, expert_gates, up, expert_ups, router))),
            self._linear(down),
            self._linear(experts_down.transpose(0, 1).flatten(1)),
            config.experts_per_token,
        )


def _reordered(weight: Tensor, head_dim: int) -> Tensor:
    """Puts the rows [heads * head_dim, in] of each head in the order of `rotary.pair_order`."""
    return weight.reshape(-1, head_dim, weight.shape[1])[:, pair_order(head_dim)].flatten(0, 1)


def _fused_qkv(get: Get, shape: LayerConfig) -> Tensor:
    parts = [_reordered(get(f"self_attn.{name}_proj.weight"), shape.head_dim) for name in ("q", "k")]
    if shape.is_sliding:
        parts.append(get("self_attn.v_proj.weight"))
    return torch.cat(parts) * get("input_layernorm.weight")


def _head_norm(get: Get, query_heads: int, shape: LayerConfig) -> Tensor:
    order = pair_order(shape.head_dim)
    query, key = get("self_attn.q_norm.weight")[order], get("self_attn.k_norm.weight")[order]
    return torch.cat((query.expand(query_heads, -1), key.expand(shape.kv_heads, -1)))


def _out(get: Get, shape: LayerConfig) -> Tensor:
    out = get("self_attn.o_proj.weight")
    if shape.is_sliding:
        return out
    # Values that are keys come in the keys' order.
    return _reordered(out.t(), shape.head_dim).t()
