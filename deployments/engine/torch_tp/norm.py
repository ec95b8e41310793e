"""Root-mean-square normalisation with few operations."""

from __future__ import annotations

import torch
from torch import Tensor


class UnitNorm:
    """x / sqrt(sum(x^2) + size * eps) over a last dimension of `size`, in float32.

    That is RMS normalisation without its factor sqrt(size), which the loader folds, with the norm's own weight, into
    what follows (`weights`). torch's rms_norm is six operations on CPU, this is three.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self._floor = torch.tensor((size * eps) ** 0.5, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalised x [..., size], always float32; written to `out` (float32, the shape of x) when given."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.div(x, length.hypot_(self._floor), out=out)
