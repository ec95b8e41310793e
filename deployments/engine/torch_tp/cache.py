"""The paged KV cache: who owns which page, who shares it, and the rows that a job's positions lie in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.checkpoint import LayerConfig
from deployments.engine.torch_tp.prefix import Part, PrefixIndex

PAGE_TOKENS = 16
# Page 0 is nobody's: padded rows are written to it and masked keys are read from it.
NO_PAGE = 0
TRASH_ROW = 0


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // PAGE_TOKENS)


class PageAllocator:
    """Hands out page numbers in [1, pages].

    Invariant: every page is free, or has owners, or is idle: nobody owns it, but the index still knows what it holds.
    Idle pages are in the order in which they were let go, and the oldest is taken when no page is free.
    """

    def __init__(self, pages: int, index: PrefixIndex | None = None) -> None:
        self.total = pages
        self.index = index or PrefixIndex()
        self._free = list(range(pages, 0, -1))
        self._idle: dict[int, None] = {}
        self._owners: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Pages with owners, each counted once."""
        return len(self._owners)

    def take(self, pages: int) -> list[int]:
        """Pages of one owner. Raises RuntimeError when fewer than `pages` have none; nothing is taken then."""
        available = len(self._free) + len(self._idle)
        if pages > available:
            raise RuntimeError(f"the KV cache has {available} free pages, {pages} are needed")
        while len(self._free) < pages:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            self.index.forget(oldest)
            self._free.append(oldest)
        taken = [self._free.pop() for _ in range(pages)]
        self._owners.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, page: int) -> None:
        """One more owner of a page that the index knows."""
        self._idle.pop(page, None)
        self._owners[page] = self._owners.get(page, 0) + 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One owner less of each. The end of a prefix is forgotten before its beginning, which more jobs share."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            del self._owners[page]
            if self.index.holds(page):
                self._idle[page] = None
            else:
                self._free.append(page)


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
        prefix_reuse: bool = True,
    ) -> None:
        scratch_pages = pages_for(canvas_tokens)
        self.index = PrefixIndex(prefix_reuse)
        self.allocator = PageAllocator(slots * pages_for(context_tokens), self.index)
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

    def copy_page(self, source: int, target: int) -> None:
        """Keys and values of one page, in every layer."""
        read, written = (slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS) for page in (source, target))
        with torch.inference_mode():
            for layer in self.layers:
                layer[written].copy_(layer[read])


class JobPages:
    """The pages of one job: those of a prefix that others computed are shared, the rest are its own.

    `rows` int64 [pages * PAGE_TOKENS] are the cache rows of its positions: one array for the job's life, and no entry
    changes once its position is encoded. Invariant: this job writes only to pages that no other job reads beyond
    what was written before.
    """

    def __init__(self, cache: KVCache, context_tokens: int) -> None:
        """For `context_tokens` positions; pages are taken by the first `adopt`."""
        self._cache = cache
        self._pages = [NO_PAGE] * pages_for(context_tokens)
        self.rows = rows_of(self._pages)

    def count_lookup(self, tokens: int) -> None:
        """A job came with `tokens` of context."""
        if self._cache.index.enabled:
            self._cache.index.lookup_tokens += tokens

    def adopt(self, parts: Sequence[Part]) -> int:
        """Shares the pages of the leading parts that are there already, and returns how many parts that are.

        Every position that has no page yet gets one. `parts` continue what this job has encoded.
        """
        found = self._cache.index.find(parts)
        if not found and NO_PAGE not in self._pages:
            return 0
        held: dict[int, int] = {}
        for part, pages in zip(parts, found, strict=False):
            # A later part's page holds what an earlier part has on it, too.
            held.update(enumerate(pages, start=part.start // PAGE_TOKENS))
        end = parts[len(found) - 1].end if found else 0
        # The page that the prefix fills in part will be written by this job: it is copied. No reference is held
        # until then, because what `take` hands out keeps its content until the next step writes.
        shared_tail = held.pop(end // PAGE_TOKENS, None)
        self._share(held)
        self._fill()
        self.rows[:] = rows_of(self._pages)
        if shared_tail is not None:
            self._cache.copy_page(shared_tail, self._pages[end // PAGE_TOKENS])
        self._cache.index.hit_tokens += end - parts[0].start if found else 0
        return len(found)

    def remember(self, part: Part) -> None:
        """Tells other jobs where `part` will lie after the step that is being made.

        They may share its pages in that very step, because in every layer all tiles write before any tile reads. A
        page that the part fills only to some position would be copied, which has to wait until it is written.
        """
        pages = self._pages[part.start // PAGE_TOKENS : pages_for(part.end)]
        if part.end % PAGE_TOKENS:
            self._cache.index.remember_after_step(part.key, pages)
        else:
            self._cache.index.remember(part.key, pages)

    def release(self) -> None:
        """Gives every page back."""
        self._cache.allocator.give_back(self._pages)
        self._pages = []

    def _share(self, held: dict[int, int]) -> None:
        for place, page in held.items():
            self._cache.allocator.share(page)
            if self._pages[place] != NO_PAGE:
                self._cache.allocator.give_back([self._pages[place]])
            self._pages[place] = page

    def _fill(self) -> None:
        places = [place for place, page in enumerate(self._pages) if page == NO_PAGE]
        for place, page in zip(places, self._cache.allocator.take(len(places)), strict=True):
            self._pages[place] = page
