"""Muon: momentum orthogonalised by Newton-Schulz steps (Jordan et al., 2024), for weight matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Pulls all singular values of each (..., rows, columns) matrix towards 1; keeps shape and dtype."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions, or three (stacked expert matrices). Equal shapes share one batch."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is never used here
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                state = self.state[param]
                average = state.setdefault("momentum", torch.zeros_like(param))
                average.lerp_(param.grad, 1 - group["momentum"])
                look_ahead = param.grad.lerp(average, group["momentum"])
                stacks[tuple(param.shape[-2:])].append((param, look_ahead.view(-1, *param.shape[-2:])))
            for (rows, columns), entries in stacks.items():
                updates = orthogonalise(torch.cat([update for _, update in entries]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                pieces = torch.split(updates, [len(update) for _, update in entries])
                for (param, _), update in zip(entries, pieces, strict=True):
                    param.sub_(update.view_as(param), alpha=scale)
