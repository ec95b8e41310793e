"""All random numbers of a job: counter-based, so that they depend on (seed, canvas, step) and on nothing else.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) as numpy ships
it. Only the raw 64-bit stream is used: numpy keeps raw streams stable, and does not promise that for the methods of
its Generator. Step 0 draws the initial canvas; denoising steps count from 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The second key word keeps Easel's streams apart from other uses of Philox with the same seed.
STREAM_KEY = 0x4541_5345_4C00_0001


def raw_draws(seed: int, canvas: int, step: int, count: int) -> NDArray[np.uint64]:
    """`count` words of the stream of one denoising step; uint64 [count]."""
    key = np.array([seed, STREAM_KEY], dtype=np.uint64)
    # Word 0 of the counter is the one that Philox itself advances.
    counter = np.array([0, 0, step, canvas], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def initial_canvas(seed: int, canvas: int, canvas_tokens: int, vocab_size: int) -> NDArray[np.int64]:
    """The noise that canvas number `canvas` starts from; int64 [canvas_tokens], uniform in [0, vocab_size)."""
    return _as_tokens(raw_draws(seed, canvas, 0, canvas_tokens), vocab_size)


def step_draws(
    seed: int, canvas: int, step: int, canvas_tokens: int, vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What one denoising step consumes, for step >= 1.

    Returns uniforms, float64 [canvas_tokens] in [0, 1), for inverse-CDF sampling; and replacement tokens, int64
    [canvas_tokens], for the positions that are noised again.
    """
    raw = raw_draws(seed, canvas, step, 2 * canvas_tokens)
    uniforms = (raw[:canvas_tokens] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms, _as_tokens(raw[canvas_tokens:], vocab_size)


def _as_tokens(raw: NDArray[np.uint64], vocab_size: int) -> NDArray[np.int64]:
    # Multiply-shift on the upper 32 bits: no modulo, and for vocab_size < 2^32 no overflow.
    return (((raw >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int64)
