"""Root-mean-square normalisation with few operations."""

from __future__ import annotations

import torch
from torch import Tensor


class RmsNorm:
    """Divides by sqrt(mean(x^2) + eps) over the last dimension, in float32; weights are applied by the caller.

    torch's own rms_norm is six operations on CPU; this is four, and its result can join the next operation.
    """

    def __init__(self, eps: float, device: torch.device) -> None:
        self._eps = torch.tensor(eps, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised x, always float32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * torch.addcmul(self._eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
