"""Matrix products over tiles whose rounding does not depend on how many tiles there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

Product = Callable[[Tensor], Tensor]
# Below this many elements oneDNN's fixed cost of 10 us a call is more than what it saves (measured on one tile of 32).
MIN_PACKED_ELEMENTS = 2**13


class TileLinear:
    """y = x @ weight^T for x [tiles, canvas_tokens, in] in the dtype and on the device of weight [out, in].

    On CUDA it is the plain product. On CPU it is oneDNN's product with a weight that is packed once: on AVX-512
    machines that MKL does not tune for, measured twice as fast as torch's own. Where this build of torch has none, a
    batched product with one matrix of a fixed shape per tile. Tests hold all of them to bit-equality between one
    tile and many.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._product = _choose_product(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)


class GatedTileLinear:
    """gelu_tanh(x @ gate^T) * (x @ up^T), for the same x as TileLinear takes; gate and up are [out, in].

    oneDNN applies the activation and the product while a result is still in registers.
    """

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        packed = [_pack(weight) for weight in (gate, up)] if gate.device.type == "cpu" else [None]
        self._product = _fused_gate(*packed) if None not in packed else _plain_gate(torch.cat((gate, up)))

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)


def tile_product(weight: Tensor) -> Product:
    """A batched product: every tile is its own matrix of the same shape, whatever the batch."""
    transposed = weight.t().contiguous()
    return lambda x: torch.bmm(x, transposed.expand(x.shape[0], -1, -1))


def _choose_product(weight: Tensor) -> Product:
    if weight.device.type != "cpu":
        return lambda x: functional.linear(x, weight)
    packed = _pack(weight) if weight.numel() >= MIN_PACKED_ELEMENTS else None
    if packed is None:
        return tile_product(weight)
    run = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: cast(Tensor, run(x, packed, None, "none", [], ""))


def _plain_gate(both: Tensor) -> Product:
    product = _choose_product(both)

    def run(x: Tensor) -> Tensor:
        gate, up = product(x).chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh").mul_(up)

    return run


def _fused_gate(gate: Any, up: Any) -> Product:  # noqa: ANN401 - an opaque packed weight
    run, times = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
    return lambda x: cast(Tensor, times(x, run(x, gate, None, "gelu", [], "tanh"), up, None, "mul"))


def _pack(weight: Tensor) -> Any:  # noqa: ANN401 - an opaque packed weight
    """The weight in oneDNN's own layout, or None where this build or machine cannot run it in this dtype."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight.contiguous())
        one = weight.new_zeros(1, 1, weight.shape[1])
        gate = ops._linear_pointwise.default(one, packed, None, "gelu", [], "tanh")
        ops._linear_pointwise.binary(one, gate, packed, None, "mul")
    except (AttributeError, RuntimeError):
        return None
    return packed
