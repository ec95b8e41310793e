"""Attention of all tiles of a step against the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deployments.engine.torch_tp.linear import TileLinear
from deployments.engine.torch_tp.norm import UnitNorm
from deployments.engine.torch_tp.plan import AttentionGroup
from deployments.engine.torch_tp.rotary import as_pairs


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of one layer type. Query heads are ordered so that `kv_heads` neighbours use different kv heads:
    query head j * kv_heads + i uses kv head i. `own_values` is false where values are the keys before weight and
    rotation (full-attention layers)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    own_values: bool

    @property
    def fused_heads(self) -> int:
        """Heads that the fused projection makes: queries, keys, and values where they are its own."""
        return self.query_heads + self.kv_heads * (2 if self.own_values else 1)

    @property
    def query_group(self) -> int:
        return self.query_heads // self.kv_heads


class HeadBuffers:
    """Memory for the heads of `tiles` tiles, with every view of it made once: at small sizes views cost as much
    as the arithmetic. Written and read within one layer; layers of one type share it.

    `heads` float32 [tiles, rows, fused_heads, head_dim]; `query` [tiles, kv_heads, rows * query_group, head_dim],
    where heads that share a kv head are rows of one matrix; `new` [tiles * rows, 2 * kv_heads, head_dim].
    """

    def __init__(self, shape: HeadShape, heads: Tensor, turned: Tensor, new: Tensor) -> None:
        queries, kv_heads, dim = shape.query_heads, shape.kv_heads, shape.head_dim
        tiles, rows = heads.shape[:2]
        self.heads = heads
        self.weighted = self.heads[:, :, : queries + kv_heads]
        self.query_pairs = as_pairs(self.heads[:, :, :queries])
        self.key_pairs = as_pairs(self.heads[:, :, queries : queries + kv_heads])
        self.values = self.heads[:, :, queries + (kv_heads if shape.own_values else 0) :]
        self.turned_pairs = as_pairs(turned)
        self.query = turned.view(tiles, rows * shape.query_group, kv_heads, dim).transpose(1, 2)
        self.new_key_pairs, self.new_values = as_pairs(new[:, :, :kv_heads]), new[:, :, kv_heads:]
        self.new = new.view(tiles * rows, 2 * kv_heads, dim)


class HeadMemory:
    """The HeadBuffers of one layer type for every number of tiles, all on the memory of the largest seen."""

    def __init__(self, shape: HeadShape, rows: int, device: torch.device) -> None:
        self._shape, self._rows, self._device = shape, rows, device
        self._made: dict[int, HeadBuffers] = {}
        self._grow(0)

    def buffers(self, tiles: int) -> HeadBuffers:
        if tiles > len(self._memory[0]):
            self._grow(tiles)
        if tiles not in self._made:
            self._made[tiles] = HeadBuffers(self._shape, *(tensor[:tiles] for tensor in self._memory))
        return self._made[tiles]

    def _grow(self, tiles: int) -> None:
        shape = self._shape
        self._made.clear()
        self._memory = [
            torch.zeros(tiles, self._rows, heads, shape.head_dim, device=self._device)
            for heads in (shape.fused_heads, shape.query_heads, 2 * shape.kv_heads)
        ]


class Attention:
    """One layer's attention. `qkv` has the input norm folded in; `head_norm` float32 [query_heads + kv_heads,
    head_dim] weighs normed queries and keys; `out` takes heads in the order of HeadShape."""

    def __init__(self, shape: HeadShape, norm: UnitNorm, qkv: TileLinear, head_norm: Tensor, out: TileLinear) -> None:
        self.shape, self._norm = shape, norm
        self._qkv, self._head_norm, self._out = qkv, head_norm, out

    def __call__(
        self,
        normed: Tensor,
        rotation: Tensor,
        cache: Tensor,
        write_rows: Tensor,
        groups: Sequence[AttentionGroup],
        buffers: HeadBuffers,
    ) -> Tensor:
        """normed [tiles, rows, hidden] -> [tiles, rows, hidden]; new keys and values are written to `cache` first.

        rotation: complex64 [tiles, rows, 1, head_dim / 2]; cache: this layer's of KVCache; the rest as in StepPlan.
        """
        self._norm(self._qkv(normed).view(buffers.heads.shape), out=buffers.heads)
        buffers.new_values.copy_(buffers.values)
        buffers.weighted.mul_(self._head_norm)
        torch.mul(buffers.query_pairs, rotation, out=buffers.turned_pairs)
        torch.mul(buffers.key_pairs, rotation, out=buffers.new_key_pairs)
        cache.index_copy_(0, write_rows, buffers.new.to(cache.dtype))
        query = buffers.query.to(cache.dtype)
        mixed = [self._attend(query, cache, group) for group in groups]
        return self._out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def _attend(self, query: Tensor, cache: Tensor, group: AttentionGroup) -> Tensor:
        """query of all tiles -> [this group's tiles, rows, query_heads * head_dim]."""
        tiles, shape = group.last - group.first, self.shape
        seen = cache.index_select(0, group.key_rows).view(tiles, -1, 2 * shape.kv_heads, shape.head_dim)
        key, value = seen.transpose(1, 2).chunk(2, dim=1)
        if tiles != len(query):
            query = query[group.first : group.last]
        # Scores are not scaled: the norms' weights have learnt the scale.
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=group.mask, scale=1.0)
        return mixed.transpose(1, 2).reshape(tiles, -1, shape.query_heads * shape.head_dim)
