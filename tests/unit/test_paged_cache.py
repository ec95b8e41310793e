"""Pages of the KV cache: one owner each, all given back, and never a row shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint import LayerConfig
from deployments.engine.torch_tp.cache import (
    PAGE_TOKENS,
    TRASH_ROW,
    KVCache,
    PageAllocator,
    pages_for,
    rows_of,
)

LAYERS = (LayerConfig(is_sliding=True, head_dim=8, kv_heads=2), LayerConfig(is_sliding=False, head_dim=16, kv_heads=1))


def cache(slots: int = 3, canvas_tokens: int = 20, context_tokens: int = 50) -> KVCache:
    return KVCache(LAYERS, slots, canvas_tokens, context_tokens, torch.float32, torch.device("cpu"))


def test_pages_for_rounds_up() -> None:
    assert [pages_for(tokens) for tokens in (0, 1, PAGE_TOKENS, PAGE_TOKENS + 1)] == [0, 1, 1, 2]


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_page_never_has_two_owners(requests: list[int]) -> None:
    allocator, held = PageAllocator(12), list[list[int]]()
    for size in requests:
        if size == 0 and held:
            allocator.give_back(held.pop(0))
        elif size <= allocator.total - allocator.used:
            held.append(allocator.take(size))
        else:
            with pytest.raises(RuntimeError, match="free pages"):
                allocator.take(size)
        owned = [page for pages in held for page in pages]
        assert len(owned) == len(set(owned)) == allocator.used
        assert all(1 <= page <= allocator.total for page in owned)


def test_rows_of_positions_context_trash_and_canvases_never_meet() -> None:
    whole = cache()
    context = rows_of(whole.allocator.take(whole.allocator.total))
    rows = np.concatenate([context, *whole.canvas_rows])
    assert len(set(rows.tolist())) == len(rows)
    assert TRASH_ROW not in rows
    assert rows.max() < len(whole.layers[0])
    assert [len(canvas) for canvas in whole.canvas_rows] == [20, 20, 20]


def test_every_slot_can_hold_a_whole_context() -> None:
    whole = cache(slots=3, context_tokens=50)
    for _ in range(3):
        whole.allocator.take(pages_for(50))
    assert whole.allocator.used == whole.allocator.total


def test_rows_follow_positions_across_scattered_pages() -> None:
    rows = rows_of([5, 2])
    assert rows.tolist() == [*range(80, 96), *range(32, 48)]


def test_layers_hold_keys_and_values_of_their_own_shape() -> None:
    layers = cache().layers
    assert [tuple(layer.shape[1:]) for layer in layers] == [(4, 8), (2, 16)]
    assert all(not layer.any() for layer in layers)
