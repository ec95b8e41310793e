"""The feed-forward part of a layer: the dense MLP and the mixture of experts, on the same normed rows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from deployments.engine.torch_tp.linear import TileLinear

# Up to this many experts, computing all of them costs less than sorting rows by expert.
MAX_DENSE_EXPERTS = 16


class FeedForward(Protocol):
    """Both branches of a layer. The norms before them, and the router's scale, are folded into their weights."""

    def __call__(self, normed: Tensor) -> Tensor:
        """Normed rows [tiles, rows, hidden] -> [2, tiles, rows, hidden]: the MLP's output, the experts' output."""


def route(scores: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """The experts of each row: float32 weights and int64 ids, both [..., per_token].

    Softmax over the chosen scores equals the renormalised top of the softmax over all of them.
    """
    top, chosen = torch.topk(scores.float(), per_token, dim=-1)
    return torch.softmax(top, dim=-1), chosen


class DenseFeedForward:
    """All experts at once: every branch's gate, up and router rows in one product, then a masked product down.

    `up` has rows [gate | up | router], where gate and up are those of the MLP, then of the experts in order. The
    weighted sum over experts happens inside `experts_down`, whose input columns are scaled by the router's weights.
    """

    def __init__(self, up: TileLinear, mlp_down: TileLinear, experts_down: TileLinear, per_token: int) -> None:
        self._up, self._mlp_down, self._experts_down = up, mlp_down, experts_down
        self._inner = mlp_down.in_features + experts_down.in_features
        self._experts = up.out_features - 2 * self._inner
        self._per_token = per_token

    def __call__(self, normed: Tensor) -> Tensor:
        gate, up, scores = self._up(normed).split((self._inner, self._inner, self._experts), dim=-1)
        inner = functional.gelu(gate, approximate="tanh").mul_(up)
        weights, chosen = route(scores, self._per_token)
        weight_of = torch.zeros(scores.shape, dtype=inner.dtype, device=inner.device)
        weight_of.scatter_(-1, chosen, weights.to(inner.dtype))
        mlp, experts = inner.split((self._mlp_down.in_features, self._experts_down.in_features), dim=-1)
        experts = experts.unflatten(-1, (self._experts, -1)) * weight_of.unsqueeze(-1)
        return torch.stack((self._mlp_down(mlp), self._experts_down(experts.flatten(-2))))


class RoutedFeedForward:
    """Only the experts that a row chose. For many experts, where computing all of them would waste the machine.

    `gate_up` is [experts, 2 * inner, hidden] and `down` [experts, hidden, inner]; `router` works in float32.
    """

    def __init__(
        self,
        mlp_up: TileLinear,
        mlp_down: TileLinear,
        router: TileLinear,
        gate_up: Tensor,
        down: Tensor,
        per_token: int,
    ) -> None:
        self._mlp_up, self._mlp_down, self._router = mlp_up, mlp_down, router
        self._gate_up, self._down, self._per_token = gate_up, down, per_token
        self._run = _grouped if _has_grouped_product(gate_up) else _one_by_one

    def __call__(self, normed: Tensor) -> Tensor:
        gate, up = self._mlp_up(normed).chunk(2, dim=-1)
        mlp = self._mlp_down(functional.gelu(gate, approximate="tanh").mul_(up))
        weights, chosen = route(self._router(normed.float()), self._per_token)
        rows = self._run(normed, chosen, self._gate_up, self._down)
        experts = (rows * weights.to(rows.dtype).unsqueeze(-1)).sum(dim=-2)
        return torch.stack((mlp, experts))


def _has_grouped_product(weight: Tensor) -> bool:
    return weight.device.type == "cuda" and weight.dtype == torch.bfloat16 and hasattr(functional, "grouped_mm")


def _gated(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = functional.linear(rows, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.gelu(gate, approximate="tanh") * up, down)


def _one_by_one(normed: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert outputs [tiles, rows, per_token, hidden], tile by tile so that no product sees another job's rows."""
    outputs = normed.new_empty(*chosen.shape, normed.shape[-1])
    for tile, choice, output in zip(normed, chosen, outputs, strict=True):
        for expert in torch.unique(choice).tolist():
            row, place = torch.where(choice == expert)
            output[row, place] = _gated(tile[row], gate_up[expert], down[expert])
    return outputs


def _grouped(normed: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same as `_one_by_one` with rows sorted by expert and one grouped product for all experts."""
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    rows = normed.flatten(0, 1)[order // chosen.shape[-1]]
    gate, up = functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    inner = functional.gelu(gate, approximate="tanh") * up
    outputs = torch.empty_like(rows)
    outputs[order] = functional.grouped_mm(inner, down.transpose(1, 2), offs=ends)
    return outputs.view(*chosen.shape, -1)
