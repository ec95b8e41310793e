"""Turns the tiles of one step into the index tensors and masks that the forward needs.

A tile is `canvas_tokens` rows at consecutive positions of one job. An ENCODE tile is causal and its keys and values
stay in the cache; a DENOISE tile is bidirectional in itself, and reads the cached context. What a tile reads, in
which padded length and order, depends on that tile alone: this is what keeps a job independent of its batch.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import ModelConfig
from deployments.engine.torch_tp.cache import TRASH_ROW

IntArray = NDArray[np.int64]
CONTEXT_BUCKET_TOKENS = 32
NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of a step. `tokens` int64 [canvas_tokens]; only the first `valid` rows count (the rest is padding).

    `start` is the position of row 0, and `context_rows` int64 [start] are the cache rows of positions below it.
    `write_rows` int64 [canvas_tokens] is where this tile's keys and values go. `slot` is set for DENOISE tiles.
    """

    tokens: IntArray
    start: int
    valid: int
    context_rows: IntArray
    write_rows: IntArray
    slot: int | None = None

    @property
    def denoises(self) -> bool:
        return self.slot is not None


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Tiles [first, last) that share one padded key length `keys`.

    `key_rows` int64 [tiles * keys]: where each tile's keys lie in the cache. `mask` [tiles, 1, rows * group, keys]
    in the run dtype: 0 where a row sees a key, else -inf; the query heads that share a kv head are rows of their own.
    """

    first: int
    last: int
    key_rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The forward's inputs, on the run device: `tokens` int64 [tiles, rows], `positions` and `write_rows` int64
    [tiles * rows], `denoising` int64 [denoise tiles], or None when every tile denoises."""

    tokens: Tensor
    positions: Tensor
    write_rows: Tensor
    denoising: Tensor | None
    full: tuple[AttentionGroup, ...]
    sliding: tuple[AttentionGroup, ...]


def context_bucket(tokens: int) -> int:
    """The padded length of a context: multiples of 32, and from 256 on of a quarter of the power of two below.

    Fewer lengths make larger groups, more lengths less padding.
    """
    step = max(CONTEXT_BUCKET_TOKENS, 1 << max((tokens - 1).bit_length() - 3, 0))
    return max(-(-tokens // step) * step, CONTEXT_BUCKET_TOKENS)


class Planner:
    """Builds plans for one model. Tiles must come sorted by `start`, so that groups are contiguous."""

    def __init__(self, config: ModelConfig, context_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = config.canvas_tokens
        self._window = config.sliding_window_tokens
        self._last_position = context_tokens - 1
        self._dtype, self._device = dtype, device
        self._offsets = np.arange(config.canvas_tokens)
        self._latest: StepPlan | None = None
        self._latest_tiles: list[Tile] = []
        self._query_groups = {layer.is_sliding: config.attention_heads // layer.kv_heads for layer in config.layers}

    def build(self, tiles: Sequence[Tile]) -> StepPlan:
        """The plan of one step; a step that only goes on with the canvases of the last one reuses its plan."""
        tokens = self._upload(np.stack([tile.tokens for tile in tiles]))
        if self._latest is None or not _same_places(self._latest_tiles, tiles):
            self._latest_tiles, self._latest = list(tiles), self._build(tiles, tokens)
        else:
            self._latest = replace(self._latest, tokens=tokens)
        return self._latest

    def _build(self, tiles: Sequence[Tile], tokens: Tensor) -> StepPlan:
        starts = np.array([tile.start for tile in tiles])
        positions = np.minimum(starts[:, None] + self._offsets, self._last_position)
        denoising = [index for index, tile in enumerate(tiles) if tile.denoises]
        return StepPlan(
            tokens=tokens,
            positions=self._upload(positions.reshape(-1)),
            write_rows=self._upload(np.concatenate([tile.write_rows for tile in tiles])),
            denoising=None if len(denoising) == len(tiles) else self._upload(np.array(denoising, dtype=np.int64)),
            full=self._groups(tiles, None),
            sliding=self._groups(tiles, self._window) if True in self._query_groups else (),
        )

    def _upload(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _groups(self, tiles: Sequence[Tile], window: int | None) -> tuple[AttentionGroup, ...]:
        reach = sys.maxsize if window is None else window - 1
        contexts = [min(tile.start, reach) for tile in tiles]
        buckets = [context_bucket(tokens) for tokens in contexts]
        groups, first = [], 0
        while first < len(tiles):
            last = bisect_right(buckets, buckets[first])
            members = list(zip(tiles[first:last], contexts[first:last], strict=True))
            groups.append(self._group(first, members, buckets[first], window))
            first = last
        return tuple(groups)

    def _group(self, first: int, members: list[tuple[Tile, int]], bucket: int, window: int | None) -> AttentionGroup:
        """A tile's keys are its own rows, then its context, then padding up to the bucket."""
        rows = self._rows
        key_rows = np.full((len(members), rows + bucket), TRASH_ROW)
        key_positions = np.full((len(members), rows + bucket), NOWHERE)
        oldest = np.zeros((len(members), rows, 1), dtype=np.int64)
        newest = np.empty((len(members), rows, 1), dtype=np.int64)
        for index, (tile, context) in enumerate(members):
            start, valid, end = tile.start, tile.valid, rows + context
            own = start + self._offsets
            key_rows[index, :valid] = tile.write_rows[:valid]
            key_positions[index, :valid] = own[:valid]
            key_rows[index, rows:end] = tile.context_rows[start - context : start]
            key_positions[index, rows:end] = np.arange(start - context, start)
            if tile.denoises:
                # Its context is cut to the window already, and its own canvas is seen whole.
                newest[index] = start + rows
                continue
            # Padded rows look where the last real one does: a row without any key would turn into NaN.
            newest[index, :, 0] = np.minimum(own, start + valid - 1)
            if window is not None:
                oldest[index] = newest[index] - (window - 1)
        seen = (key_positions[:, None] <= newest) & (key_positions[:, None] >= oldest)
        return AttentionGroup(
            first=first,
            last=first + len(members),
            key_rows=self._upload(key_rows.reshape(-1)),
            mask=self._mask(seen, self._query_groups[window is not None]),
        )

    def _mask(self, seen: NDArray[np.bool_], query_group: int) -> Tensor:
        visible = torch.from_numpy(seen).to(self._device)[:, None]
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~visible, -torch.inf).repeat_interleave(query_group, dim=2)


def _same_places(before: Sequence[Tile], now: Sequence[Tile]) -> bool:
    """Whether these are the same canvases on the same context. `is`: a job's rows are one array for its life."""
    return len(before) == len(now) and all(
        old.denoises and old.slot == new.slot and old.start == new.start and old.context_rows is new.context_rows
        for old, new in zip(before, now, strict=True)
    )
