"""The sampler's move to the next denoising step, to train on the canvases that sampling really shows."""

from __future__ import annotations

import torch
from torch import Tensor

from models.tasks import CANVAS_TOKENS

ENTROPY_BOUND = 0.1


def next_canvases(noised: Tensor, cooled: Tensor, is_canvas: Tensor, share: float, random: torch.Generator) -> Tensor:
    """A copy of `noised` where a random `share` of the canvases went through one sampler step.

    noised: int64 (rows, row_tokens). is_canvas: bool, same shape; a canvas lies in one piece. cooled:
    logits divided by the temperature, float32 (rows, row_tokens, vocab). Positions are accepted in order of
    entropy while the sum of the lower entropies stays within the bound (the rule of transformers'
    generation_diffusion_gemma.py); they take a sampled token, the others a random one.
    """
    places = is_canvas.flatten().nonzero().view(-1, CANVAS_TOKENS)
    chance = cooled.flatten(0, 1)[places].softmax(-1)
    entropy = torch.special.entr(chance).sum(-1)
    ordered, order = entropy.sort(-1)
    within = ordered.cumsum(-1) - ordered <= ENTROPY_BOUND
    accepted = torch.zeros_like(within).scatter(-1, order, within)
    drawn = torch.multinomial(chance.flatten(0, 1), 1, generator=random).view_as(places)
    fresh = torch.randint(0, cooled.shape[-1], places.shape, generator=random)
    chosen = torch.rand((len(places), 1), generator=random) < share
    result = noised.flatten().clone()
    result[places] = torch.where(chosen, torch.where(accepted, drawn, fresh), result[places])
    return result.view_as(noised)
