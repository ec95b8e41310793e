"""From a denoising step's hidden rows to the next canvas: on the whole vocabulary, or on shards of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deployments.engine.torch_tp.group import Group
from deployments.engine.torch_tp.model import Model
from deployments.engine.torch_tp.sampler import (
    StepInputs,
    StepOutputs,
    accepted_positions,
    first_above,
    inverse_cdf,
)

Decision = Callable[[Tensor, StepInputs], StepOutputs]
# A token as digits that every run dtype holds exactly: bfloat16 has all integers up to 256.
DIGIT = 256
TOKEN_DIGITS = 3
SMALLEST = 2.0**-149


def decision(model: Model, group: Group) -> Decision:
    """How this rank turns hidden rows, [tiles, rows, hidden] in the run dtype, into StepOutputs."""
    return WholeVocabulary(model) if group.world == 1 else ShardedVocabulary(model, group)


class WholeVocabulary:
    """Samples, accepts the surest positions and noises the rest again, on one rank."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, hidden: Tensor, inputs: StepInputs) -> StepOutputs:
        scores = self._model.logits(hidden).div_(inputs.temperatures)
        log_probabilities = torch.log_softmax(scores, dim=-1)
        probabilities = log_probabilities.exp()
        entropy = log_probabilities.mul_(probabilities).sum(dim=-1).neg_()
        accept = accepted_positions(entropy, inputs.entropy_bounds)
        sampled = inverse_cdf(probabilities, inputs.uniforms)
        return StepOutputs(
            argmax=scores.argmax(dim=-1),
            next_canvas=torch.where(accept, sampled, inputs.replacements),
            mean_entropy=entropy.mean(dim=-1),
            accepted=accept.sum(dim=-1),
            soft=self._model.soft_embedding(scores, probabilities),
        )


class ShardStats(NamedTuple):
    """What one shard says of its part of a softmax, each float64 [tiles, rows].

    `peak` is its highest score and `best` the smallest token that has it. With w = exp(score - peak): `mass` = sum w,
    `leaning` = sum (score - peak) w. `soft_mass` is `mass` of the scores rounded to the run dtype.
    """

    peak: Tensor
    best: Tensor
    mass: Tensor
    leaning: Tensor
    soft_mass: Tensor


STATS = len(ShardStats._fields)


class ShardWeights(NamedTuple):
    """exp(score - the shard's peak), float32 [tiles, rows, tokens], and the same of scores in the run dtype. In float32
    both are one tensor."""

    exact: Tensor
    rounded: Tensor


class ShardedVocabulary:
    """The same decision when every rank has the scores of its own tokens: no scores are exchanged.

    Two messages: the ShardStats of every rank, 5 float64 a position; and the sum of the self-conditioning embedding,
    which also carries the token that one shard has drawn. What decides comes from the gathered stats, by the same
    arithmetic on the same numbers, and from a sum with one term: so it is bit-equal on all ranks.
    """

    def __init__(self, model: Model, group: Group) -> None:
        self._model, self._group = model, group

    def __call__(self, hidden: Tensor, inputs: StepInputs) -> StepOutputs:
        own, weights = self._look(self._model.logits(hidden).div_(inputs.temperatures))
        gathered = ShardStats(*self._group.gather(torch.stack(own)).unbind(1))
        peak = gathered.peak.amax(dim=0)
        # Within [0, 1]: how much a shard's weights count once they refer to the common peak. On one rank, what is
        # below float32's smallest number has no probability: no draw, however small, may find it here.
        factors = (gathered.peak - peak).exp()
        factors.masked_fill_(factors < SMALLEST, 0.0)
        cdf = (factors * gathered.mass).cumsum(dim=0)
        entropy = _entropy(gathered, peak, factors, cdf[-1])
        accept = accepted_positions(entropy, inputs.entropy_bounds)
        token = self._draw(weights.exact, cdf, inputs.uniforms)
        soft, sampled = self._exchange(self._soft(weights.rounded, gathered), token)
        # torch.argmax takes the first of equals, and shards are in the order of their tokens.
        first_best = gathered.peak.argmax(dim=0, keepdim=True)
        return StepOutputs(
            argmax=gathered.best.gather(0, first_best).squeeze(0).long(),
            next_canvas=torch.where(accept, sampled, inputs.replacements),
            mean_entropy=entropy.mean(dim=-1),
            accepted=accept.sum(dim=-1),
            soft=soft,
        )

    def _look(self, scores: Tensor) -> tuple[ShardStats, ShardWeights]:
        """scores: float32 [tiles, rows, tokens], overwritten."""
        best = scores.argmax(dim=-1)
        peak = scores.gather(-1, best.unsqueeze(-1))
        rounded = None if self._model.dtype == torch.float32 else _rounded_weights(scores, peak, self._model.dtype)
        below = scores.sub_(peak)
        exact = below.exp()
        mass = exact.sum(dim=-1, dtype=torch.float64)
        stats = ShardStats(
            peak=peak.squeeze(-1).double(),
            best=(best + self._model.first_token).double(),
            mass=mass,
            leaning=below.mul_(exact).sum(dim=-1, dtype=torch.float64),
            soft_mass=mass if rounded is None else rounded.sum(dim=-1, dtype=torch.float64),
        )
        return stats, ShardWeights(exact, exact if rounded is None else rounded)

    def _draw(self, weights: Tensor, cdf: Tensor, uniforms: Tensor) -> Tensor:
        """The token at `uniforms` of the whole mass where it is this shard's, else 0; int64 [tiles, rows].

        cdf: float64 [world, tiles, rows], the mass up to the end of every shard.
        """
        rank = self._group.rank
        owner = first_above(cdf.movedim(0, -1), uniforms.unsqueeze(-1))
        before = cdf[rank - 1] if rank else torch.zeros_like(uniforms)
        inside = (uniforms * cdf[-1] - before) / (cdf[rank] - before)
        # Where another shard is the owner, `inside` may be anything: it must only stay a number.
        token = inverse_cdf(weights, inside.nan_to_num(0.0)) + self._model.first_token
        return torch.where(owner == rank, token, 0)

    def _soft(self, weights: Tensor, gathered: ShardStats) -> Tensor:
        """This shard's part of the next self-conditioning embedding, [tiles, rows, hidden] in the run dtype.

        The reference rounds scores to the embedding's dtype before its softmax, and rounding keeps their order: so the
        peaks are rounded here. weights: ShardWeights.rounded, overwritten.
        """
        peaks = gathered.peak.to(self._model.dtype).double()
        factors = (peaks - peaks.amax(dim=0)).exp()
        share = factors[self._group.rank] / (factors * gathered.soft_mass).sum(dim=0)
        return self._model.expected_embedding(weights.mul_(share.float().unsqueeze(-1)))

    def _exchange(self, soft: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Both sums over the shards, in one message."""
        places = DIGIT ** torch.arange(TOKEN_DIGITS, device=token.device)
        digits = (token.unsqueeze(-1) // places) % DIGIT
        total = self._group.sum(torch.cat((soft, digits.to(soft.dtype)), dim=-1))
        soft, digits = total.split_with_sizes((soft.shape[-1], TOKEN_DIGITS), dim=-1)
        return soft, (digits.long() * places).sum(dim=-1)


def _rounded_weights(scores: Tensor, peak: Tensor, dtype: torch.dtype) -> Tensor:
    return scores.to(dtype).float().sub_(peak.to(dtype).float()).exp_()


def _entropy(gathered: ShardStats, peak: Tensor, factors: Tensor, total: Tensor) -> Tensor:
    """-sum p log p of the whole softmax, float32 [tiles, rows] in nats, from stats of [world, tiles, rows].

    With scores s below the common peak: log(sum e^s) - (sum s e^s) / (sum e^s). Both terms are positive, so nothing
    cancels.
    """
    leaning = factors * (gathered.leaning + (gathered.peak - peak) * gathered.mass)
    return (total.log() - leaning.sum(dim=0) / total).float()
