"""Pages that outlive their owners: who shares them, which are taken first, and that ranks agree on it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cluster.checkpoint import LayerConfig
from deployments.engine.torch_tp.cache import PAGE_TOKENS, JobPages, KVCache, PageAllocator, pages_for
from deployments.engine.torch_tp.prefix import Part, PrefixIndex, next_part

LAYERS = (LayerConfig(is_sliding=False, head_dim=4, kv_heads=1),)


def cache(slots: int = 2, context_tokens: int = 8 * PAGE_TOKENS) -> KVCache:
    return KVCache(LAYERS, slots, PAGE_TOKENS, context_tokens, torch.float32, torch.device("cpu"))


def parts_of(tokens: list[int], size: int) -> list[Part]:
    parts: list[Part] = []
    for first in range(0, len(tokens), size):
        parts.append(next_part(parts[-1] if parts else None, np.array(tokens[first : first + size])))
    return parts


def encoded(whole: KVCache, parts: list[Part], context_tokens: int) -> JobPages:
    """A job that computed what nobody had: its rows hold its tokens."""
    pages = JobPages(whole, context_tokens)
    for part in parts[pages.adopt(parts) :]:
        pages.remember(part)
        for row, token in zip(pages.rows[part.start : part.end], part.tokens, strict=True):
            whole.layers[0][row] = float(token)
    whole.index.settle()
    return pages


def held(whole: KVCache, pages: JobPages, count: int) -> list[float]:
    return whole.layers[0][pages.rows[:count], 0, 0].tolist()


def test_keys_tell_apart_tokens_tilings_and_what_came_before() -> None:
    prompts = [([1, 2, 3, 4], 2), ([1, 2, 3, 4], 4), ([1, 2, 3, 5], 2), ([2, 1, 3, 4], 2), ([1, 2, 3], 2)]
    keys = [parts_of(tokens, size)[-1].key for tokens, size in prompts]
    assert len(set(keys)) == len(keys)
    assert keys[0] == parts_of([1, 2, 3, 4], 2)[-1].key


def test_a_shared_page_is_free_for_others_only_after_its_last_owner() -> None:
    allocator = PageAllocator(2)
    (page, _) = allocator.take(2)
    allocator.share(page)
    allocator.give_back([page])
    with pytest.raises(RuntimeError, match="0 free pages"):
        allocator.take(1)
    allocator.give_back([page])
    assert allocator.take(1) == [page]


def test_pages_that_hold_a_prefix_are_taken_last_the_longest_unused_first_and_ends_before_beginnings() -> None:
    index = PrefixIndex()
    allocator = PageAllocator(5, index)
    first, second = allocator.take(2), allocator.take(2)
    for key, page in zip((b"a", b"b", b"c", b"d"), (*first, *second), strict=True):
        index.remember(key, [page])
    allocator.give_back(first)
    allocator.give_back(second)
    allocator.share(first[1])
    allocator.give_back([first[1]])
    assert allocator.used == 0
    assert allocator.take(1) == [5]
    assert [allocator.take(1)[0] for _ in range(4)] == [first[0], second[1], second[0], first[1]]
    assert not any(index.holds(page) for page in range(6))


def test_a_part_is_forgotten_with_any_of_its_pages() -> None:
    index = PrefixIndex()
    index.remember(b"a", [1, 2])
    index.remember(b"b", [2, 3])
    index.forget(1)
    assert (index.holds(1), index.holds(2), index.holds(3)) == (False, True, True)
    index.remember(b"a", [4])
    index.forget(2)
    assert (index.holds(2), index.holds(3), index.holds(4)) == (False, False, True)


@pytest.mark.parametrize("size", [PAGE_TOKENS, 10, 2 * PAGE_TOKENS, 40])
def test_an_equal_prefix_lies_on_the_same_pages_and_the_page_that_goes_on_is_a_copy(size: int) -> None:
    whole, tokens = cache(), list(range(1, 74))
    reach = 100
    one = encoded(whole, parts_of(tokens, size), reach)
    other = encoded(whole, parts_of(tokens, size), reach)
    assert held(whole, one, len(tokens)) == held(whole, other, len(tokens)) == tokens
    same = len(tokens) // PAGE_TOKENS * PAGE_TOKENS
    assert np.array_equal(one.rows[:same], other.rows[:same])
    assert not set(one.rows[same:]) & set(other.rows[same:])
    assert whole.allocator.used == 2 * pages_for(reach) - same // PAGE_TOKENS


def test_a_partly_filled_page_is_found_only_after_the_step_that_fills_it() -> None:
    whole, parts = cache(), parts_of(list(range(20)), 20)
    one, other = JobPages(whole, 40), JobPages(whole, 40)
    one.adopt(parts)
    one.remember(parts[0])
    assert other.adopt(parts) == 0
    whole.index.settle()
    assert other.adopt(parts) == 1


def test_the_full_reach_of_every_slot_fits_whatever_was_shared_before() -> None:
    whole = cache(slots=2, context_tokens=6 * PAGE_TOKENS)
    rng = random.Random(3)
    stems = [[rng.randrange(90) for _ in range(6 * PAGE_TOKENS)] for _ in range(2)]
    jobs: list[tuple[JobPages, list[int]]] = []
    for number in range(200):
        if len(jobs) == 2:
            pages, tokens = jobs.pop(rng.randrange(2))
            assert held(whole, pages, len(tokens)) == tokens
            pages.release()
        tokens = [*rng.choice(stems)[: rng.randrange(6 * PAGE_TOKENS - 1)], number]
        jobs.append((encoded(whole, parts_of(tokens, 24), 6 * PAGE_TOKENS), tokens))
        assert all(held(whole, pages, len(tokens)) == tokens for pages, tokens in jobs)
    assert whole.index.hit_tokens > 0


def test_the_same_calls_give_the_same_rows_on_every_rank() -> None:
    ranks = [cache(), cache()]
    rng = random.Random(5)
    jobs: list[list[JobPages]] = []
    for _ in range(40):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 100))]
        for pages in jobs.pop(0) if len(jobs) == 2 else []:
            pages.release()
        jobs.append([encoded(rank, parts_of(tokens, 16), 100) for rank in ranks])
        assert np.array_equal(jobs[-1][0].rows, jobs[-1][1].rows)
