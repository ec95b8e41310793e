"""Loads a checkpoint into the fused form that the forward uses, tensor by tensor.

Fused once, in float32, before the cast to the run dtype: q, k and v into one matrix; the gates, and the ups, of all
branches; the norm before a matrix into its columns, with the factor that `norm.UnitNorm` leaves out; the router's
scale into its matrix; the experts' per-expert scale into their down matrix; the layer's scalar into its last norm.
Heads and their dimensions are reordered as `attention.HeadShape` and `rotary.pair_order` say.
A rank of a tensor-parallel group reads only its `Shard` of every file: query heads with the kv heads they need, inner
columns of every feed-forward, and tokens of the vocabulary. The router and the norms are on every rank.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from deployments.engine.torch_tp.shard import HeadCut, Shard

ALL = slice(None)


class Get(Protocol):
    """Reads one tensor of the checkpoint, or a part of it; float32 on the host."""

    def __call__(self, name: str, *part: slice) -> Tensor: ...


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
    """One rank's model. `embedding` is [vocab, hidden] in the run dtype, or its rows from `first_token` on; on CUDA
    `head` shares its memory."""

    embedding: Tensor
    first_token: int
    head: TileLinear
    soft_embedding: TileLinear
    condition_gated: GatedTileLinear
    condition_down: TileLinear
    final_norm: Tensor
    layers: tuple[LayerWeights, ...]


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> ModelWeights:
    """Reads every part once; the peak is the rank's model plus its part of one layer in float32 on the host."""
    shard = shard or Shard()
    with _OpenFiles() as files:

        def get(name: str, *part: slice) -> Tensor:
            whole = shard.world == 1 or not part
            # A copy: the tensor is a view of the mapped file, which may change while this process serves.
            weight = files.tensor(checkpoint.tensors[name].file, name, () if whole else part)
            weight = weight.to(torch.float32, copy=True)
            # UnitNorm leaves the factor of RMS normalisation to the weight of the norm.
            return weight.mul_(len(weight) ** 0.5) if _is_norm(name) else weight

        model = _Loader(checkpoint.config, shard, get, dtype, device).model()
    _return_freed_memory()
    return model


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

    def tensor(self, file: Path, name: str, part: tuple[slice, ...]) -> Tensor:
        if file not in self._files:
            self._files[file] = safe_open(str(file), framework="pt").__enter__()
        opened = self._files[file]
        tensor: Tensor = opened.get_slice(name)[part] if part else opened.get_tensor(name)
        return tensor


class _Loader:
    def __init__(self, config: ModelConfig, shard: Shard, get: Get, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._shard, self._get, self._dtype, self._device = config, shard, get, dtype, device

    def model(self) -> ModelWeights:
        get, prefix, tokens = self._get, "model.decoder.self_conditioning", self._shard.cut(self._config.vocab_size)
        inner = self._shard.cut(self._config.intermediate_size)
        embedding = get("model.decoder.embed_tokens.weight", tokens).to(self._device, self._dtype)
        norm = get(f"{prefix}.pre_norm.weight")
        return ModelWeights(
            embedding=embedding,
            first_token=tokens.start,
            head=TileLinear(embedding),
            soft_embedding=TileLinear(embedding.t()),
            condition_gated=self._gated(
                get(f"{prefix}.gate_proj.weight", inner).mul_(norm), get(f"{prefix}.up_proj.weight", inner).mul_(norm)
            ),
            condition_down=self._linear(get(f"{prefix}.down_proj.weight", ALL, inner)),
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
        def get(name: str, *part: slice) -> Tensor:
            return self._get(f"model.decoder.layers.{index}.{name}", *part)

        _return_freed_memory()
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
        cut = self._shard.heads(self._config, layer)
        own = cut.queries.stop - cut.queries.start
        shape = HeadShape(own, len(cut.kv_heads), layer.head_dim, own_values=layer.is_sliding)
        order, rows = pair_order(shape.head_dim), _times(cut.queries, shape.head_dim)
        queries = _as_heads(get("self_attn.q_proj.weight", rows), shape)[_head_order(shape)][:, order]
        keys = self._kv_heads(get, "k_proj", cut, shape)[:, order]
        values = [self._kv_heads(get, "v_proj", cut, shape)] if shape.own_values else []
        fused = torch.cat((queries, keys, *values)).flatten(0, 1).mul_(get("input_layernorm.weight"))
        norms = [get(f"self_attn.{name}_norm.weight")[order] for name in ("q", "k")]
        head_norm = torch.cat((norms[0].expand(shape.query_heads, -1), norms[1].expand(shape.kv_heads, -1)))
        # Values that are keys come with their dimensions in the keys' order.
        inner = slice(None) if shape.own_values else order
        out = _as_heads(get("self_attn.o_proj.weight", ALL, rows).t(), shape)[_head_order(shape)][:, inner]
        norm = UnitNorm(shape.head_dim, self._config.rms_norm_eps, self._device)
        # Values are normed without a weight, so their norm's factor goes into what they are multiplied with.
        weighted_out = out.flatten(0, 1).t() * shape.head_dim**0.5
        return Attention(shape, norm, self._linear(fused), self._vector(head_norm), self._linear(weighted_out))

    def _kv_heads(self, get: Get, name: str, cut: HeadCut, shape: HeadShape) -> Tensor:
        """This rank's heads of k_proj or v_proj, [kv_heads, head_dim, hidden]."""
        first, last = cut.kv_heads[0], cut.kv_heads[-1]
        heads = _as_heads(get(f"self_attn.{name}.weight", _times(slice(first, last + 1), shape.head_dim)), shape)
        return heads[torch.tensor(cut.kv_heads) - first]

    def _feed_forward(self, get: Get) -> FeedForward:
        config = self._config
        norm, inner = get("pre_feedforward_layernorm.weight"), self._shard.cut(config.intermediate_size)
        gate, up = get("mlp.gate_proj.weight", inner).mul_(norm), get("mlp.up_proj.weight", inner).mul_(norm)
        down = self._linear(get("mlp.down_proj.weight", ALL, inner))
        # The router norms without a weight and scales by hidden^-0.5, which is what UnitNorm gives.
        router = TileLinear(self._vector(get("router.proj.weight") * get("router.scale")))
        experts_inner = self._shard.cut(config.expert_intermediate_size)
        experts_up = self._expert_gate_up(get, experts_inner).mul_(get("pre_feedforward_layernorm_2.weight"))
        experts_down = get("experts.down_proj", ALL, ALL, experts_inner)
        experts_down.mul_(get("router.per_expert_scale")[:, None, None])
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

    def _expert_gate_up(self, get: Get, inner: slice) -> Tensor:
        """Gates, then ups, of all experts: [experts, 2 * inner, hidden]."""
        if self._shard.world == 1:
            return get("experts.gate_up_proj")
        size = self._config.expert_intermediate_size
        ups = slice(size + inner.start, size + inner.stop)
        return torch.cat([get("experts.gate_up_proj", ALL, part) for part in (inner, ups)], dim=1)


def _return_freed_memory() -> None:
    """glibc keeps what is freed between pieces that stay. See benchmarks/loading.py."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _times(part: slice, size: int) -> slice:
    """The rows of a matrix that hold heads `part`, of `size` rows each."""
    return slice(part.start * size, part.stop * size)


def _as_heads(weight: Tensor, shape: HeadShape) -> Tensor:
    """[heads * head_dim, in] -> [heads, head_dim, in]."""
    return weight.reshape(-1, shape.head_dim, weight.shape[1])


def _head_order(shape: HeadShape) -> Tensor:
    """Where the query heads of HeadShape come from: in a checkpoint, heads of one kv head are neighbours."""
    return torch.arange(shape.query_heads).view(shape.kv_heads, shape.query_group).t().reshape(-1)
