"""The parts of a denoising step's decision: DiffusionGemma's entropy-bound sampler, vectorised over tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.core import SamplingParams

# Above this vocabulary size the inverse CDF goes over blocks first, so that no cumulative sum spans the vocabulary.
BLOCK_TOKENS = 512
# Keeps a draw of almost 1 below the total, whatever the rounding of the product.
BELOW_ONE = 1.0 - 2.0**-52


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Per denoising tile, on the run device: `temperatures` float32 [tiles, 1, 1], `entropy_bounds` float32
    [tiles, 1], `uniforms` float64 [tiles, rows], `replacements` int64 [tiles, rows]."""

    temperatures: Tensor
    entropy_bounds: Tensor
    uniforms: Tensor
    replacements: Tensor


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Per denoising tile: `argmax` and `next_canvas` int64 [tiles, rows], `mean_entropy` float32 [tiles] in nats,
    `accepted` int64 [tiles]; `soft` is the next step's self-conditioning, [tiles, rows, hidden] in the run dtype."""

    argmax: Tensor
    next_canvas: Tensor
    mean_entropy: Tensor
    accepted: Tensor
    soft: Tensor


def temperature(sampling: SamplingParams, step: int) -> float:
    """The linear schedule at denoising step `step` (from 1) of the job's own max_denoising_steps, in float32.

    n of N steps remain, and the temperature is t_min + (t_max - t_min) * n / N; the reference counts n down in
    float32, so the roundings are repeated here.
    """
    remaining = sampling.max_denoising_steps + 1 - step
    fraction = np.float32(remaining) / np.float32(sampling.max_denoising_steps)
    return float(np.float32(sampling.t_min) + np.float32(sampling.t_max - sampling.t_min) * fraction)


def accepted_positions(entropy: Tensor, bounds: Tensor) -> Tensor:
    """Positions in order of entropy while the entropies before them sum to at most the bound; bool [tiles, rows].

    entropy: float32 [tiles, rows] in nats; bounds: [tiles, 1]. The sum bounds the joint mutual information of what
    is accepted (Ben-Hamu et al., arXiv 2505.24857). Equal entropies keep their order.
    """
    ordered, order = torch.sort(entropy, dim=-1, stable=True)
    within = ordered.cumsum(dim=-1).sub_(ordered) <= bounds
    return torch.zeros_like(within).scatter_(-1, order, within)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest token whose cumulative probability exceeds u * total, in float64; int64 [tiles, rows].

    probabilities: [tiles, rows, vocab], need not sum to exactly 1; uniforms: float64 [tiles, rows] in [0, 1).
    """
    draws = uniforms.unsqueeze(-1)
    vocab_size = probabilities.shape[-1]
    if vocab_size <= BLOCK_TOKENS:
        return first_above(probabilities.cumsum(dim=-1, dtype=torch.float64), draws)
    padded = torch.nn.functional.pad(probabilities, (0, -vocab_size % BLOCK_TOKENS))
    blocks = padded.unflatten(-1, (-1, BLOCK_TOKENS))
    block_cdf = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = draws * block_cdf[..., -1:]
    block = first_above(block_cdf, draws).unsqueeze(-1)
    index = block.unsqueeze(-1).expand(*block.shape, BLOCK_TOKENS)
    inner_cdf = blocks.gather(-2, index).squeeze(-2).cumsum(dim=-1, dtype=torch.float64)
    before = torch.where(block > 0, block_cdf.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    inside = (target - before) / inner_cdf[..., -1:]
    return block.squeeze(-1) * BLOCK_TOKENS + first_above(inner_cdf, inside)


def first_above(cdf: Tensor, fraction: Tensor) -> Tensor:
    """The first index whose cdf, float64 [..., n], exceeds `fraction` [..., 1] of the last one; int64 [...]."""
    target = fraction.clamp(0.0, BELOW_ONE) * cdf[..., -1:]
    return (cdf <= target).sum(dim=-1)
