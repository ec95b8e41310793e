"""Which pages hold which context, so that a prefix that several jobs have in common is computed once.

A prefix is known by its tiles, not by its pages: what a tile computes depends on all of its rows and on the tiles
before it (docs/adr/0003), so pages are bit for bit those of another job exactly when both cut the same tokens into
the same tiles. Nothing here asks a clock or an order of hashing: the same calls give the same pages on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
KEY_BYTES = 16
NO_CONTEXT = bytes(KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Part:
    """Up to one tile of a job's context: `tokens` int64 at the positions [start, end).

    `key` names the whole context up to `end`, tokens and tiling: equal keys mean equal keys and values.
    """

    tokens: IntArray
    start: int
    key: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def next_part(before: Part | None, tokens: IntArray) -> Part:
    """The part that follows `before`."""
    start, key = (0, NO_CONTEXT) if before is None else (before.end, before.key)
    return Part(tokens, start, blake2b(key + tokens.tobytes(), digest_size=KEY_BYTES).digest())


class PrefixIndex:
    """Part keys, each with the pages that hold that part's positions, the first and the last maybe in part.

    Invariant: a page holds every position below the end of each key it is under, of that key's own context; where a
    page is under several keys of one context, the longest context's page holds what the others' hold.
    `lookup_tokens` counts the context that jobs came with, `hit_tokens` what of it was there already.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.lookup_tokens = self.hit_tokens = 0
        self._pages: dict[bytes, tuple[int, ...]] = {}
        self._keys: dict[int, list[bytes]] = {}
        self._computing: list[tuple[bytes, tuple[int, ...]]] = []

    def find(self, parts: Sequence[Part]) -> list[tuple[int, ...]]:
        """The pages of the leading parts, up to the first that nobody has computed."""
        found: list[tuple[int, ...]] = []
        for part in parts:
            pages = self._pages.get(part.key)
            if pages is None:
                break
            found.append(pages)
        return found

    def remember(self, key: bytes, pages: Sequence[int]) -> None:
        """`pages` hold the part `key`, or will by the step that is being made; the first to say so is kept."""
        if not self.enabled or key in self._pages:
            return
        self._pages[key] = tuple(pages)
        for page in pages:
            self._keys.setdefault(page, []).append(key)

    def remember_after_step(self, key: bytes, pages: Sequence[int]) -> None:
        """As `remember`, but nobody finds it before `settle`: for a part whose last page has to be copied."""
        self._computing.append((key, tuple(pages)))

    def settle(self) -> None:
        """The step was made."""
        for key, pages in self._computing:
            self.remember(key, pages)
        self._computing.clear()

    def holds(self, page: int) -> bool:
        return page in self._keys

    def forget(self, page: int) -> None:
        """The page is about to be written anew: no part lies on it any more."""
        for key in self._keys.pop(page, ()):
            for other in self._pages.pop(key):
                if other != page:
                    self._drop(other, key)

    def _drop(self, page: int, key: bytes) -> None:
        self._keys[page].remove(key)
        if not self._keys[page]:
            del self._keys[page]
