"""One matrix product over tiles whose rounding does not depend on how many tiles there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class TileLinear:
    """y = x @ weight^T for x [tiles, canvas_tokens, in] in the dtype and on the device of weight [out, in].

    On CUDA it is the plain product. On CPU it is oneDNN's product with a weight packed once, which on AVX-512
    machines that MKL does not know is twice as fast as torch's own (and not slower on others); where this build of
    torch has none, a batched product with one fixed-shape matrix per tile. Tests hold all of them to bit-equality
    between one tile and many.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._product = _choose_product(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)


def _choose_product(weight: Tensor) -> Product:
    if weight.device.type != "cpu":
        return lambda x: torch.nn.functional.linear(x, weight)
    return _packed_product(weight) or tile_product(weight)


def _packed_product(weight: Tensor) -> Product | None:
    """oneDNN's packed linear, or None where this build or machine cannot run it in this dtype."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight.contiguous())
        run = ops._linear_pointwise.default
        run(weight.new_zeros(1, 1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda x: cast(Tensor, run(x, packed, None, "none", [], ""))


def tile_product(weight: Tensor) -> Product:
    """A batched product: every tile is its own matrix of the same shape, whatever the batch."""
    transposed = weight.t().contiguous()
    return lambda x: torch.bmm(x, transposed.expand(x.shape[0], -1, -1))
