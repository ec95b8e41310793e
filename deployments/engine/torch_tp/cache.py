"""The paged KV cache: who owns which page, and the rows that a job's positions lie in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import LayerConfig

PAGE_TOKENS = 16
# Page 0 is nobody's: padded rows are written to it and masked keys are read from it.
TRASH_ROW = 0


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // PAGE_TOKENS)


class PageAllocator:
    """Hands out page numbers in [1, pages]. Invariant: every page is free or has exactly one owner."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages, 0, -1))

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def take(self, pages: int) -> list[int]:
        """Raises RuntimeError when fewer than `pages` are free; nothing is taken then."""
        if pages > len(self._free):
            raise RuntimeError(f"the KV cache has {len(self._free)} free pages, {pages} are needed")
        return [self._free.pop() for _ in range(pages)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(reversed(pages))


def rows_of(pages: Sequence[int]) -> NDArray[np.int64]:
    """The cache rows of consecutive positions on `pages`; int64 [len(pages) * PAGE_TOKENS]."""
    starts = np.asarray(pages, dtype=np.int64) * PAGE_TOKENS
    return (starts[:, None] + np.arange(PAGE_TOKENS)).reshape(-1)


class KVCache:
    """Keys and values of every layer; one row per position, and the same row number in every layer.

    `layers[i]` is [rows, 2 * kv_heads, head_dim]: keys, then values. `canvas_rows[slot]` are scratch rows where a
    denoising step keeps the keys and values of the canvas itself, so that attention reads everything from one
    place; they are overwritten at every step and never become context.
    """

    def __init__(
        self,
        layers: Sequence[LayerConfig],
        slots: int,
        canvas_tokens: int,
        context_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        scratch_pages = pages_for(canvas_tokens)
        self.allocator = PageAllocator(slots * pages_for(context_tokens))
        self.canvas_rows = [
            rows_of(range(first, first + scratch_pages))[:canvas_tokens]
            for first in range(
                self.allocator.total + 1, self.allocator.total + 1 + slots * scratch_pages, scratch_pages
            )
        ]
        rows = (1 + self.allocator.total + slots * scratch_pages) * PAGE_TOKENS
        # Zeros, not empty: a masked key still meets 0 * value, and uninitialised memory may hold a NaN.
        self.layers: tuple[Tensor, ...] = tuple(
            torch.zeros(rows, 2 * layer.kv_heads, layer.head_dim, dtype=dtype, device=device) for layer in layers
        )
