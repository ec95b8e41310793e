"""Loads a checkpoint into the fused form that the forward uses, tensor by tensor.

Fused once, in float32, before the cast to the run dtype: q, k and v into one matrix; the gates, and the ups, of all
branches; the norm before a matrix into its columns, with the factor that `norm.UnitNorm` leaves out; the router's
scale into its matrix; the experts' per-expert scale into their down matrix; the layer's scalar into its last norm.
Heads and their dimensions are reordered as `attention.HeadShape` and `rotary.pair_order` say.
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
from deployments.engine.torch_tp.attention import Attention, HeadShape
from deployments.engine.torch_tp.experts import (
    MAX_DENSE_EXPERTS,
    DenseFeedForward,
    FeedForward,
    RoutedFeedForward,
)
from deployments.engine.torch_tp.linear import GatedTileLinear, TileLinear
from deployments.engine.torch_tp.norm import UnitNorm
from deployments.engine.torch_tp.rotary import pair_order

Get = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every matrix a process holds."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norm weights are float32 [hidden]: `mlp_norm` and `experts_norm` follow the two branches of the
    feed-forward, `post_norm` their sum, and it has the layer's `scalar` in it already."""

    is_sliding: bool
    attention: Attention
    post_attention_norm: Tensor
    feed_forward: FeedForward
    mlp_norm: Tensor
    experts_norm: Tensor
    post_norm: Tensor
    scalar: float


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole model. `embedding` is [vocab, hidden] in the run dtype; on CUDA `head` shares its memory."""

    embedding: Tensor
    head: TileLinear
    soft_embedding: TileLinear
    condition_gated: GatedTileLinear
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
            # A copy: the tensor is a view of the mapped file, which may change while this process serves.
            weight = files.tensor(checkpoint.tensors[name].file, name).to(torch.float32, copy=True)
            # UnitNorm leaves the factor of RMS normalisation to the weight of the norm.
            return weight * len(weight) ** 0.5 if _is_norm(name) else weight

        return _Loader(checkpoint.config, get, dtype, device).model()


def _is_norm(name: str) -> bool:
    """q_norm.weight, input_layernorm.weight, post_feedforward_layernorm_2.weight, ..."""
    return "norm" in name.split(".")[-2]


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
        norm = get(f"{prefix}.pre_norm.weight")
        return ModelWeights(
            embedding=embedding,
            head=TileLinear(embedding),
            soft_embedding=TileLinear(embedding.t()),
            condition_gated=self._gated(
                get(f"{prefix}.gate_proj.weight") * norm, get(f"{prefix}.up_proj.weight") * norm
            ),
            condition_down=self._linear(get(f"{prefix}.down_proj.weight")),
            final_norm=self._vector(get("model.decoder.norm.weight")),
            layers=tuple(self._layer(index, shape) for index, shape in enumerate(self._config.layers)),
        )

    def _linear(self, weight: Tensor) -> TileLinear:
        return TileLinear(weight.to(self._device, self._dtype))

    def _gated(self, gate: Tensor, up: Tensor) -> GatedTileLinear:
        return GatedTileLinear(gate.to(self._device, self._dtype), up.to(self._device, self._dtype))

    def _vector(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, torch.float32)

    def _layer(self, index: int, shape: LayerConfig) -> LayerWeights:
        def get(name: str) -> Tensor:
            return self._get(f"model.decoder.layers.{index}.{name}")

        scalar = float(get("layer_scalar"))
        return LayerWeights(
            is_sliding=shape.is_sliding,
            attention=self._attention(get, shape),
            post_attention_norm=self._vector(get("post_attention_layernorm.weight")),
            feed_forward=self._feed_forward(get),
            mlp_norm=self._vector(get("post_feedforward_layernorm_1.weight")),
            experts_norm=self._vector(get("post_feedforward_layernorm_2.weight")),
            post_norm=self._vector(get("post_feedforward_layernorm.weight") * scalar),
            scalar=scalar,
        )

    def _attention(self, get: Get, layer: LayerConfig) -> Attention:
        shape = HeadShape(self._config.attention_heads, layer.kv_heads, layer.head_dim, own_values=layer.is_sliding)
        order = pair_order(shape.head_dim)
        queries = _as_heads(get("self_attn.q_proj.weight"), shape)[_head_order(shape)][:, order]
        keys = _as_heads(get("self_attn.k_proj.weight"), shape)[:, order]
        values = [_as_heads(get("self_attn.v_proj.weight"), shape)] if shape.own_values else []
        fused = torch.cat((queries, keys, *values)).flatten(0, 1) * get("input_layernorm.weight")
        norms = [get(f"self_attn.{name}_norm.weight")[order] for name in ("q", "k")]
        head_norm = torch.cat((norms[0].expand(shape.query_heads, -1), norms[1].expand(shape.kv_heads, -1)))
        # Values that are keys come with their dimensions in the keys' order.
        inner = slice(None) if shape.own_values else order
        out = _as_heads(get("self_attn.o_proj.weight").t(), shape)[_head_order(shape)][:, inner]
        norm = UnitNorm(shape.head_dim, self._config.rms_norm_eps, self._device)
        # Values are normed without a weight, so their norm's factor goes into what they are multiplied with.
        weighted_out = out.flatten(0, 1).t() * shape.head_dim**0.5
        return Attention(shape, norm, self._linear(fused), self._vector(head_norm), self._linear(weighted_out))

    def _feed_forward(self, get: Get) -> FeedForward:
        config = self._config
        norm = get("pre_feedforward_layernorm.weight")
        gate, up = get("mlp.gate_proj.weight") * norm, get("mlp.up_proj.weight") * norm
        down = self._linear(get("mlp.down_proj.weight"))
        # The router norms without a weight and scales by hidden^-0.5, which is what UnitNorm gives.
        router = TileLinear(self._vector(get("router.proj.weight") * get("router.scale")))
        experts_up = get("experts.gate_up_proj") * get("pre_feedforward_layernorm_2.weight")
        experts_down = get("experts.down_proj") * get("router.per_expert_scale")[:, None, None]
        if config.experts > MAX_DENSE_EXPERTS:
            return RoutedFeedForward(
                self._gated(gate, up),
                down,
                router,
                experts_up.to(self._device, self._dtype),
                experts_down.to(self._device, self._dtype),
                config.experts_per_token,
            )
        expert_gates, expert_ups = (half.flatten(0, 1) for half in experts_up.chunk(2, dim=1))
        return DenseFeedForward(
            self._gated(torch.cat((gate, expert_gates)), torch.cat((up, expert_ups))),
            down,
            router,
            self._linear(experts_down.transpose(0, 1).flatten(1)),
            config.experts_per_token,
        )


def _as_heads(weight: Tensor, shape: HeadShape) -> Tensor:
    """[heads * head_dim, in] -> [heads, head_dim, in]."""
    return weight.reshape(-1, shape.head_dim, weight.shape[1])


def _head_order(shape: HeadShape) -> Tensor:
    """Where the query heads of HeadShape come from: in a checkpoint, heads of one kv head are neighbours."""
    return torch.arange(shape.query_heads).view(shape.kv_heads, shape.query_group).t().reshape(-1)
