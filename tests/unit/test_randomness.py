"""A job's random numbers: the same for ever, and different wherever they should be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deployments.engine.randomness import initial_canvas, step_draws

GOLDEN_CANVAS = [49364, 203963, 195142, 79355, 225675, 161869, 216941, 199841]
GOLDEN_UNIFORMS = [0.2628063122715407, 0.09683450338826272, 0.37322700333433523, 0.45999352261430515]
GOLDEN_REPLACEMENTS = [102739, 253282, 184163, 129548]


def test_the_draws_are_the_ones_of_every_earlier_release() -> None:
    uniforms, replacements = step_draws(seed=4821, canvas=2, step=3, canvas_tokens=4, vocab_size=262_144)
    assert initial_canvas(seed=4821, canvas=2, canvas_tokens=8, vocab_size=262_144).tolist() == GOLDEN_CANVAS
    assert uniforms.tolist() == GOLDEN_UNIFORMS
    assert replacements.tolist() == GOLDEN_REPLACEMENTS


def test_seed_canvas_and_step_each_make_another_stream() -> None:
    places = list(itertools.product((0, 1, 2**64 - 1), (0, 1, 7), (1, 2, 48)))
    streams = {step_draws(seed, canvas, step, 8, 1000)[0].tobytes() for seed, canvas, step in places}
    starts = {initial_canvas(seed, canvas, 8, 1000).tobytes() for seed, canvas, _ in places}
    assert len(streams) == len(places)
    assert len(starts) == 9


def test_a_longer_canvas_starts_with_the_same_noise() -> None:
    assert initial_canvas(5, 0, 64, 128)[:32].tolist() == initial_canvas(5, 0, 32, 128).tolist()


@pytest.mark.parametrize("vocab_size", [2, 128, 262_144, 2**31])
def test_draws_are_uniform_over_their_range(vocab_size: int) -> None:
    uniforms, tokens = step_draws(1, 0, 1, 20_000, vocab_size)
    assert uniforms.dtype == np.float64
    assert tokens.dtype == np.int64
    assert 0.0 <= uniforms.min() < 0.001
    assert 0.999 < uniforms.max() < 1.0
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size
    # The mean of n uniform draws lies within 5 standard deviations, 1 / sqrt(12 n) each.
    allowed = 5 / np.sqrt(12 * 20_000)
    assert abs(uniforms.mean() - 0.5) < allowed
    assert abs((tokens / (vocab_size - 1)).mean() - 0.5) < allowed * vocab_size / (vocab_size - 1)
