"""The lean model against transformers: the same logits, wherever the context lies against the sliding window."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cluster.checkpoint import Checkpoint, read_checkpoint
from tests.oracle import (
    TRAINED,
    RandomShape,
    ReferenceRunner,
    TileRunner,
    load_reference,
    trained_checkpoint,
    write_random_checkpoint,
)

MAX_LOGIT_DIFFERENCE = 1e-4
DRAWN = {
    "dense experts": RandomShape(),
    "many experts": RandomShape(experts=24, experts_per_token=3, canvas=8, older_keys=True),
    "canvas wider than the window": RandomShape(sliding_window=12, canvas=20),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, read by Easel and by transformers."""

    checkpoint: Checkpoint
    reference: Any

    def tokens(self, count: int, seed: int) -> list[int]:
        draws = np.random.default_rng(seed).integers(5, self.checkpoint.card.vocab_size, count)
        return [int(token) for token in draws]

    def canvas(self, seed: int) -> NDArray[np.int64]:
        return np.array(self.tokens(self.checkpoint.card.canvas_tokens, seed), dtype=np.int64)


@pytest.fixture(scope="module", params=[*TRAINED, *DRAWN])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.set_num_threads(1)
    if request.param in DRAWN:
        path = write_random_checkpoint(tmp_path_factory.mktemp("drawn"), DRAWN[request.param])
    else:
        path = trained_checkpoint(request.param)
    return Pair(read_checkpoint(path), load_reference(path))


def contexts(pair: Pair) -> list[int]:
    window = pair.checkpoint.config.sliding_window_tokens
    return [1, 3, window - 1, window, window + 1, 2 * window, 4 * window]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def test_logits_are_the_references_at_every_context_length(pair: Pair) -> None:
    for length in contexts(pair):
        ours, theirs = TileRunner(pair.checkpoint), ReferenceRunner(pair.reference)
        context, canvas = pair.tokens(length, seed=length), pair.canvas(seed=1000 + length)
        plain = theirs.logits(context, canvas)
        assert difference(ours.logits(context, canvas), plain) <= MAX_LOGIT_DIFFERENCE, length
        assert plain.std() > 0.1, "the comparison needs logits that differ"


def test_logits_with_self_conditioning_are_the_references(pair: Pair) -> None:
    for length in contexts(pair):
        ours, theirs = TileRunner(pair.checkpoint), ReferenceRunner(pair.reference)
        context, canvas = pair.tokens(length, seed=length), pair.canvas(seed=2000 + length)
        scores = theirs.logits(context, canvas) / 0.7
        ours.logits(context, canvas)
        soft = ours.soft_embedding(scores)
        conditioned = theirs.logits([], canvas, scores)
        assert difference(ours.logits([], canvas, soft), conditioned) <= MAX_LOGIT_DIFFERENCE, length


def test_logits_across_commits_are_the_references(pair: Pair) -> None:
    ours, theirs = TileRunner(pair.checkpoint), ReferenceRunner(pair.reference)
    context = pair.tokens(5, seed=1)
    for number in range(6):
        canvas = pair.canvas(seed=number)
        assert difference(ours.logits(context, canvas), theirs.logits(context, canvas)) <= MAX_LOGIT_DIFFERENCE
        context = [int(token) for token in canvas]


def test_bfloat16_rounds_about_as_much_as_the_references_bfloat16(pair: Pair) -> None:
    rounded = copy.deepcopy(pair.reference).to(torch.bfloat16)
    ours, theirs = [], []
    for seed in range(16):
        context, canvas = pair.tokens(40, seed), pair.canvas(seed + 50)
        exact = ReferenceRunner(pair.reference).logits(context, canvas)
        ours.append(float((TileRunner(pair.checkpoint, torch.bfloat16).logits(context, canvas) - exact).norm()))
        theirs.append(float((ReferenceRunner(rounded).logits(context, canvas) - exact).norm()))
    # Medians: on either side, a rounding that sends one row to another expert makes a rare large error.
    assert statistics.median(ours) < 1.25 * statistics.median(theirs)
