"""The feed-forward part of a layer: the dense MLP and the mixture of experts, on the same normed rows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from deployments.engine.torch_tp.linear import GatedTileLinear, TileLinear

# Up to this many experts, computing all of them costs less than sorting rows by expert.
MAX_DENSE_EXPERTS = 16


class FeedForward(Protocol):
    """Both branches of a layer. The norms before them, and the router's scale, are folded into their weights."""

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Normed rows -> the MLP's output and the experts' output, all [tiles, rows, hidden] in the run dtype."""


def route(scores: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """The experts of each row, from float32 scores: float32 weights and int64 ids, both [..., per_token].

    Softmax over the chosen scores equals the renormalised top of the softmax over all of them.
    """
    top, chosen = torch.topk(scores, per_token, dim=-1)
    return torch.softmax(top, dim=-1), chosen


class DenseFeedForward:
    """All experts at once: every branch's gated product in one, then a masked product down.

    The inner columns of `gated` are those of the MLP, then of the experts in order. The weighted sum over experts
    happens inside `experts_down`, whose input columns are scaled by the router's weights. `router` works in float32,
    so that rounding decides on no expert.
    """

    def __init__(
        self,
        gated: GatedTileLinear,
        mlp_down: TileLinear,
        router: TileLinear,
        experts_down: TileLinear,
        per_token: int,
    ) -> None:
        self._gated, self._mlp_down, self._router, self._experts_down = gated, mlp_down, router, experts_down
        self._sizes = (mlp_down.in_features, experts_down.in_features)
        self._per_token = per_token

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        mlp, experts = self._gated(normed).split_with_sizes(self._sizes, dim=-1)
        scores = self._router(normed.float())
        weights, chosen = route(scores, self._per_token)
        weight_of = torch.zeros_like(scores).scatter_(-1, chosen, weights).to(experts.dtype)
        weighted = experts.view(*scores.shape, -1) * weight_of.unsqueeze(-1)
        return self._mlp_down(mlp), self._experts_down(weighted.view(experts.shape))


class RoutedFeedForward:
    """Only the experts that a row chose. For many experts, where computing all of them would waste the machine.

    `gate_up` is [experts, 2 * inner, hidden] and `down` [experts, hidden, inner]; `router` works in float32.
    """

    def __init__(
        self,
        mlp_gated: GatedTileLinear,
        mlp_down: TileLinear,
        router: TileLinear,
        gate_up: Tensor,
        down: Tensor,
        per_token: int,
    ) -> None:
        self._mlp_gated, self._mlp_down, self._router = mlp_gated, mlp_down, router
        self._gate_up, self._down, self._per_token = gate_up, down, per_token
        self._run = _grouped if _has_grouped_product(gate_up) else _one_by_one

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = route(self._router(normed.float()), self._per_token)
        rows = self._run(normed, chosen, self._gate_up, self._down)
        experts = (rows * weights.to(rows.dtype).unsqueeze(-1)).sum(dim=-2)
        return self._mlp_down(self._mlp_gated(normed)), experts


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
    """The same as `_one_by_one` with rows sorted by expert and one grouped product for all experts.

    Where experts end is searched for and not counted: torch.bincount waits for the device.
    """
    experts, order = torch.sort(chosen.flatten(), stable=True)
    numbers = torch.arange(gate_up.shape[0], device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    rows = normed.flatten(0, 1)[order // chosen.shape[-1]]
    gate, up = functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    inner = functional.gelu(gate, approximate="tanh") * up
    outputs = torch.empty_like(rows)
    outputs[order] = functional.grouped_mm(inner, down.transpose(1, 2), offs=ends)
    return outputs.view(*chosen.shape, -1)
