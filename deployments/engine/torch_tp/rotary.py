"""Rotary positions as one complex product, with a head's dimensions reordered so that the pairs are neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.checkpoint import RopeConfig


def rotation_table(rope: RopeConfig, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """e^(i * position * frequency), complex64 [positions, head_dim / 2].

    Frequency j is theta^(-2j / head_dim) / factor for the first `rotated_fraction` of the pairs, else 0: with a
    fraction of 1 the usual rotary embedding (Su et al. 2021), below 1 transformers' "proportional" type.
    """
    rotated = int(rope.rotated_fraction * head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32) / head_dim
    frequencies = torch.zeros(head_dim // 2)
    frequencies[:rotated] = 1.0 / (rope.theta**exponents) / rope.factor
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin()).to(device)


def pair_order(head_dim: int) -> Tensor:
    """Where dimension i of a reordered head comes from: 0, d/2, 1, d/2 + 1, ...; int64 [head_dim]."""
    return torch.arange(head_dim).view(2, head_dim // 2).t().reshape(-1)


def as_pairs(heads: Tensor) -> Tensor:
    """Reordered heads, float32 [..., head_dim], as complex64 [..., head_dim / 2] on the same memory."""
    return torch.view_as_complex(heads.view(*heads.shape[:-1], heads.shape[-1] // 2, 2))
