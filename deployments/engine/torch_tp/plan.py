"""Turns the tiles of one step into the index tensors and masks that the forward needs.

A tile is `canvas_tokens` rows at consecutive positions of one job. An ENCODE tile is causal and its keys and values
stay in the cache; a DENOISE tile is bidirectional in itself, and reads the cached context. What a tile reads, in
which padded length and order, depends on that tile alone: this is what keeps a job independent of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import ModelConfig
from deployments.engine.torch_tp.cache import TRASH_ROW

IntArray = NDArray[np.int64]
MIN_CONTEXT_BUCKET = 64
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

    `key_rows` int64 [tiles * keys]: where each tile's keys lie in the cache. `mask` [tiles, 1, group * rows, keys]
    in the run dtype: 0 where a row sees a key, else -inf; query heads of one kv head are stacked along the rows.
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
    """The padded length for a context of `tokens`: 64, 128, 192, 256, then steps of a quarter of the power of two."""
    step = max(MIN_CONTEXT_BUCKET, 1 << max(tokens - 1, 1).bit_length() - 3)
    return max(-(-tokens // step) * step, MIN_CONTEXT_BUCKET)


class Planner:
    """Builds plans for one model. Tiles must come sorted by `start`, so that groups are contiguous."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._window = config.sliding_window_tokens
        self._last_position = config.max_position_tokens - 1
        self._rows = config.canvas_tokens
        self._dtype, self._device = dtype, device
        self._full_group = _query_group(config, is_sliding=False)
        self._sliding_group = _query_group(config, is_sliding=True)

    def build(self, tiles: Sequence[Tile]) -> StepPlan:
        offsets = np.arange(self._rows)
        starts = np.array([tile.start for tile in tiles])
        positions = np.minimum(starts[:, None] + offsets, self._last_position)
        denoising = [index for index, tile in enumerate(tiles) if tile.denoises]
        return StepPlan(
            tokens=self._upload(np.stack([tile.tokens for tile in tiles])),
            positions=self._upload(positions.reshape(-1)),
            write_rows=self._upload(np.concatenate([tile.write_rows for tile in tiles])),
            denoising=None if len(denoising) == len(tiles) else self._upload(np.array(denoising)),
            full=self._groups(tiles, self._full_group, lambda tile: tile.start),
            sliding=self._groups(tiles, self._sliding_group, lambda tile: min(tile.start, self._window - 1)),
        )

    def _upload(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _groups(
        self, tiles: Sequence[Tile], query_group: int, context_tokens: Callable[[Tile], int]
    ) -> tuple[AttentionGroup, ...]:
        if not query_group:
            return ()
        groups, first = [], 0
        for bucket, members in groupby(tiles, key=lambda tile: context_bucket(context_tokens(tile))):
            same = list(members)
            last = first + len(same)
            groups.append(self._group(first, last, bucket, query_group, [(t, context_tokens(t)) for t in same]))
            first = last
        return tuple(groups)

    def _group(
        self, first: int, last: int, bucket: int, query_group: int, members: list[tuple[Tile, int]]
    ) -> AttentionGroup:
        """Keys are the tile's own rows, then its context, then padding up to the bucket."""
        rows = self._rows
        key_rows = np.full((len(members), rows + bucket), TRASH_ROW)
        key_positions = np.full((len(members), rows + bucket), NOWHERE)
        newest = np.empty((len(members), rows), dtype=np.int64)
        oldest = np.empty((len(members), rows), dtype=np.int64)
        for index, (tile, context) in enumerate(members):
            own = tile.start + np.arange(rows)
            key_rows[index, : tile.valid] = tile.write_rows[: tile.valid]
            key_positions[index, : tile.valid] = own[: tile.valid]
            key_rows[index, rows : rows + context] = tile.context_rows[tile.start - context : tile.start]
            key_positions[index, rows : rows + context] = own[0] - context + np.arange(context)
            # Padded rows look where the last real one does: a row without any key would turn into NaN.
            seen = np.minimum(own, tile.start + tile.valid - 1)
            newest[index] = own[-1] if tile.denoises else seen
            # The context of a denoising tile is cut to the window already; its own canvas is seen whole.
            sees_all = tile.denoises or context == tile.start
            oldest[index] = 0 if tile.denoises else seen - (self._window - 1 if query_group == 0 else 0)
        raise NotImplementedError
