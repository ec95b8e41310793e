"""The forward pass: tiles of many jobs in, final hidden rows of the denoising tiles out.

Encoder and decoder are one set of weights, so prompt chunks, commits and denoising steps share every matrix product;
only what a row may attend to, and the denoising rows' input, tell them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cluster.checkpoint import ModelConfig
from deployments.engine.torch_tp.norm import RmsNorm
from deployments.engine.torch_tp.plan import AttentionGroup, StepPlan
from deployments.engine.torch_tp.rotary import rotate, rotation_table
from deployments.engine.torch_tp.weights import LayerWeights, ModelWeights


class Model:
    """Weights, rotation tables and the layer loop. `hidden` rows are in the run dtype, norms in float32."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, positions: int) -> None:
        device = weights.embedding.device
        self._config, self._weights = config, weights
        self._dtype = weights.embedding.dtype
        self._norm = RmsNorm(config.rms_norm_eps, device)
        # The reference rounds this factor to the embedding's dtype before it multiplies.
        self.embed_scale = float(torch.tensor(config.hidden_size**0.5, dtype=self._dtype))
        ropes = {True: config.sliding_rope, False: config.full_rope}
        self._rotations = {
            layer.is_sliding: rotation_table(ropes[layer.is_sliding], layer.head_dim, positions, device)
            for layer in config.layers
        }

    def forward(self, plan: StepPlan, soft: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
        """One pass over a step's tiles.

        soft: self-conditioning embeddings of the denoising tiles in their order, [denoise tiles, rows, hidden] in
        the run dtype, zeros before a canvas's first step. cache: `KVCache.layers`, written and read.
        Returns the last hidden rows of the denoising tiles, [denoise tiles, rows, hidden], after the final norm.
        """
        x = self._embed(plan, soft)
        rows = x.shape[:2]
        rotations = {
            kind: table.index_select(0, plan.positions).view(*rows, 1, -1) for kind, table in self._rotations.items()
        }
        for layer, keys_values in zip(self._weights.layers, cache, strict=True):
            groups = plan.sliding if layer.shape.is_sliding else plan.full
            rotation = rotations[layer.shape.is_sliding]
            x = self._attention(layer, x, rotation, keys_values, plan.write_rows, groups)
            x = self._feed_forward(layer, x)
        if plan.denoising is not None:
            x = x.index_select(0, plan.denoising)
        return (self._norm(x) * self._weights.final_norm).to(self._dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped scores, float32 [tiles, rows, vocab]."""
        cap = self._config.logit_softcap
        return self._weights.head(hidden).float().div_(cap).tanh_().mul_(cap)

    def soft_embedding(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        """The expected embedding under a step's prediction: the next step's self-conditioning.

        scores: temperature-scaled logits, float32 [tiles, rows, vocab]; probabilities: their softmax. The reference
        rounds the scores to the embedding's dtype before its own softmax.
        """
        if self._dtype != torch.float32:
            probabilities = torch.softmax(scores.to(self._dtype), dim=-1, dtype=torch.float32)
        return self._weights.soft_embedding(probabilities.to(self._dtype)).mul_(self.embed_scale)

    def _embed(self, plan: StepPlan, soft: Tensor) -> Tensor:
        x = functional.embedding(plan.tokens, self._weights.embedding) * self.embed_scale
        if plan.denoising is None:
            return self._condition(x, soft)
        if len(plan.denoising) == 0:
            return x
        canvas = self._condition(x.index_select(0, plan.denoising), soft)
        return x.index_copy_(0, plan.denoising, canvas)

    def _condition(self, embedded: Tensor, soft: Tensor) -> Tensor:
        """Adds what the last step believed: embedding + gated MLP(norm(soft)), normed."""
        gate, up = self._weights.condition_up(self._norm(soft).to(self._dtype)).chunk(2, dim=-1)
        signal = self._weights.condition_down(functional.gelu(gate, approximate="tanh").mul_(up))
        return self._norm(signal.add_(embedded)).to(self._dtype)

    def _attention(
        self,
        layer: LayerWeights,
        x: Tensor,
        rotation: Tensor,
        keys_values: Tensor,
        write_rows: Tensor,
        groups: tuple[AttentionGroup, ...],
    ) -> Tensor:
        shape, queries = layer.shape, layer.query_heads
        fused = layer.qkv(self._norm(x).to(self._dtype)).unflatten(-1, (-1, shape.head_dim))
        heads = self._norm(fused)
        turned = rotate(heads[:, :, : len(layer.head_norm)] * layer.head_norm, rotation)
        new = torch.cat((turned[:, :, queries:], heads[:, :, layer.value_head :][:, :, : shape.kv_heads]), dim=2)
        keys_values.index_copy_(0, write_rows, new.flatten(0, 1).to(self._dtype))
        # Query heads that share a kv head become rows of one matrix, so keys and values are never repeated.
        stacked = turned[:, :, :queries].unflatten(2, (shape.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        query = stacked.flatten(2, 3).to(self._dtype)
        mixed = [self._attend(query, keys_values, group) for group in groups]
        out = layer.out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        return torch.addcmul(x, self._norm(out), layer.post_attention_norm).to(self._dtype)

    def _attend(self, query: Tensor, keys_values: Tensor, group: AttentionGroup) -> Tensor:
        """query [tiles, kv_heads, query_group * rows, head_dim] -> [group's tiles, rows, heads * head_dim]."""
        tiles, rows = group.last - group.first, self._config.canvas_tokens
        seen = keys_values.index_select(0, group.key_rows).unflatten(1, (2, -1)).unflatten(0, (tiles, -1))
        key, value = seen.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(
            query[group.first : group.last], key, value, attn_mask=group.mask, scale=1.0
        )
        return mixed.view(*mixed.shape[:2], -1, rows, mixed.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2)

    def _feed_forward(self, layer: LayerWeights, x: Tensor) -> Tensor:
        branches = self._norm(layer.feed_forward(self._norm(x).to(self._dtype))) * layer.branch_norms
        total = self._norm(branches.sum(dim=0).to(self._dtype))
        kept = x if layer.scalar == 1.0 else x * layer.scalar
        return torch.addcmul(kept, total, layer.post_norm).to(self._dtype)
