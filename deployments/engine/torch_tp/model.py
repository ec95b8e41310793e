"""The forward pass: tiles of many jobs in, final hidden rows of the denoising tiles out.

Encoder and decoder are one set of weights, so prompt chunks, commits and denoising steps share every matrix product;
only what a row may attend to, and the denoising rows' input, tell them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cluster.checkpoint import ModelConfig
from deployments.engine.torch_tp.attention import HeadMemory
from deployments.engine.torch_tp.group import Group, Solo
from deployments.engine.torch_tp.norm import UnitNorm
from deployments.engine.torch_tp.plan import StepPlan
from deployments.engine.torch_tp.rotary import rotation_table
from deployments.engine.torch_tp.weights import LayerWeights, ModelWeights


class Model:
    """Weights, rotation tables and the layer loop. `hidden` rows are in the run dtype, norms in float32.

    On a shard, products give partial sums: the embedding with the self-conditioning, the attention, and both branches
    of the feed-forward are each summed over `group` in one message. Everything between is computed on every rank.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, positions: int, group: Group | None = None) -> None:
        device = weights.embedding.device
        self._config, self._weights, self._group = config, weights, group or Solo()
        self.dtype = self._dtype = weights.embedding.dtype
        self.first_token = weights.first_token
        self._norm = UnitNorm(config.hidden_size, config.rms_norm_eps, device)
        # The reference rounds this factor to the embedding's dtype before it multiplies.
        self.embed_scale = float(torch.tensor(config.hidden_size**0.5, dtype=self._dtype))
        heads = {layer.is_sliding: layer.attention.shape for layer in weights.layers}
        ropes = {True: config.sliding_rope, False: config.full_rope}
        self._rotations = {
            kind: rotation_table(ropes[kind], shape.head_dim, positions, device) for kind, shape in heads.items()
        }
        self._memory = {kind: HeadMemory(shape, config.canvas_tokens, device) for kind, shape in heads.items()}

    def reserve(self, tiles: int) -> None:
        """Makes room for steps of up to `tiles` tiles, so that no later one moves the memory that they work in."""
        for memory in self._memory.values():
            memory.buffers(tiles)

    def forward(self, plan: StepPlan, soft: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
        """One pass over a step's tiles.

        soft: self-conditioning embeddings of the denoising tiles in their order, [denoise tiles, rows, hidden] in
        the run dtype, zeros before a canvas's first step. cache: `KVCache.layers`, written and read.
        Returns the last hidden rows of the denoising tiles, [denoise tiles, rows, hidden], after the final norm.
        """
        x = self._embed(plan, soft)
        tiles, rows, _ = x.shape
        buffers = {kind: memory.buffers(tiles) for kind, memory in self._memory.items()}
        rotations = {
            kind: table.index_select(0, plan.positions).view(tiles, rows, 1, -1)
            for kind, table in self._rotations.items()
        }
        for layer, keys_values in zip(self._weights.layers, cache, strict=True):
            kind = layer.is_sliding
            partial = layer.attention(
                self._norm(x).to(self._dtype),
                rotations[kind],
                keys_values,
                plan.write_rows,
                plan.sliding if kind else plan.full,
                buffers[kind],
            )
            mixed = self._group.sum(partial)
            x = torch.addcmul(x, self._norm(mixed), layer.post_attention_norm).to(self._dtype)
            x = self._feed_forward(layer, x)
        if plan.denoising is not None:
            x = x.index_select(0, plan.denoising)
        return (self._norm(x) * self._weights.final_norm).to(self._dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped scores of this rank's tokens, from `first_token` on; float32 [tiles, rows, vocab or its part]."""
        cap = self._config.logit_softcap
        return self._weights.head(hidden).float().div_(cap).tanh_().mul_(cap)

    def soft_embedding(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        """The expected embedding under a step's prediction: the next step's self-conditioning.

        scores: temperature-scaled logits, float32 [tiles, rows, vocab]; probabilities: their softmax. The reference
        rounds the scores to the embedding's dtype before its own softmax.
        """
        if self._dtype != torch.float32:
            probabilities = torch.softmax(scores.to(self._dtype), dim=-1, dtype=torch.float32)
        return self.expected_embedding(probabilities)

    def expected_embedding(self, probabilities: Tensor) -> Tensor:
        """Scaled embeddings weighed by float32 [tiles, rows, vocab or its part]; a partial sum on a shard."""
        return self._weights.soft_embedding(probabilities.to(self._dtype)).mul_(self.embed_scale)

    def _embed(self, plan: StepPlan, soft: Tensor) -> Tensor:
        x = self._look_up(plan.tokens)
        if plan.denoising is None:
            return self._renorm(self._group.sum(self._condition(x, soft)))
        if len(plan.denoising) == 0:
            return self._group.sum(x)
        canvas = self._condition(x.index_select(0, plan.denoising), soft)
        if self._group.world == 1:
            return x.index_copy_(0, plan.denoising, self._renorm(canvas))
        x = self._group.sum(x.index_copy_(0, plan.denoising, canvas))
        return x.index_copy_(0, plan.denoising, self._renorm(x.index_select(0, plan.denoising)))

    def _look_up(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [tiles, rows, hidden]; zeros where another rank has the token."""
        embedding = self._weights.embedding
        if self._group.world == 1:
            return functional.embedding(tokens, embedding) * self.embed_scale
        local = tokens - self.first_token
        elsewhere = (local < 0) | (local >= len(embedding))
        x = functional.embedding(local.masked_fill_(elsewhere, 0), embedding) * self.embed_scale
        return x.masked_fill_(elsewhere.unsqueeze(-1), 0.0)

    def _condition(self, embedded: Tensor, soft: Tensor) -> Tensor:
        """Adds what the last step believed: embedding + gated MLP(norm(soft))."""
        signal = self._weights.condition_down(self._weights.condition_gated(self._norm(soft).to(self._dtype)))
        return signal.add_(embedded)

    def _renorm(self, conditioned: Tensor) -> Tensor:
        return self._norm(conditioned).mul_(self._config.hidden_size**0.5).to(self._dtype)

    def _feed_forward(self, layer: LayerWeights, x: Tensor) -> Tensor:
        mlp, experts = self._group.sum_pair(*layer.feed_forward(self._norm(x).to(self._dtype)))
        both = torch.addcmul(self._norm(mlp) * layer.mlp_norm, self._norm(experts), layer.experts_norm)
        total = self._norm(both.to(self._dtype))
        kept = x if layer.scalar == 1.0 else x * layer.scalar
        return torch.addcmul(kept, total, layer.post_norm).to(self._dtype)
