"""The training model: DiffusionGemma's text part with one set of weights for encoder and decoder rows.

Parameter names are the official ones below `model.decoder.`. Semantics follow transformers'
models/diffusion_gemma/modeling_diffusion_gemma.py. Experts are computed densely and weighted, which for a
handful of experts is faster on a CPU than sending tokens around. Router and head stay in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. Layers alternate sliding and full attention and end with a full one."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    global_head_dim: int = 64
    dense_intermediate: int = 128
    expert_intermediate: int = 64
    experts: int = 4
    top_k: int = 2
    vocab_tokens: int = 128
    window_tokens: int = 64
    softcap: float = 30.0

    def layer_type(self, index: int) -> str:
        return "full_attention" if index % 2 else "sliding_attention"


class Norm(nn.Module):
    """RMS norm with a learnt scale."""

    def __init__(self, dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return plain_norm(x) * self.weight


def plain_norm(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def inverse_frequencies(shape: Shape, layer_type: str) -> Tensor:
    """RoPE frequencies, float32 (head_dim / 2,): default on sliding layers, proportional on full ones."""
    if layer_type == "sliding_attention":
        return 10_000.0 ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    dim = shape.global_head_dim
    turned = dim // 8  # a quarter of the dimensions, in pairs
    frequencies = 1_000_000.0 ** -(torch.arange(0, 2 * turned, 2).float() / dim)
    return torch.cat([frequencies, torch.zeros(dim // 2 - turned)])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    """Grouped-query attention with q/k norms and scale 1; full layers take the un-normed keys as values."""

    def __init__(self, shape: Shape, layer_type: str) -> None:
        super().__init__()
        sliding = layer_type == "sliding_attention"
        self.dim = dim = shape.head_dim if sliding else shape.global_head_dim
        self.group = shape.heads // shape.kv_heads
        self.q_proj = linear(shape.hidden, shape.heads * dim)
        self.k_proj = linear(shape.hidden, shape.kv_heads * dim)
        self.v_proj = linear(shape.hidden, shape.kv_heads * dim) if sliding else None
        self.o_proj = linear(shape.heads * dim, shape.hidden)
        self.q_norm = Norm(dim, 1.2 * dim**-0.25)
        self.k_norm = Norm(dim, 1.2 * dim**-0.25)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        query = self.q_proj(x).view(rows, tokens, -1, self.dim)
        key = self.k_proj(x).view(rows, tokens, -1, self.dim)
        value = key if self.v_proj is None else self.v_proj(x).view(rows, tokens, -1, self.dim)
        query = rotate(self.q_norm(query), cos, sin).transpose(1, 2)
        key = rotate(self.k_norm(key), cos, sin).permute(0, 2, 3, 1).repeat_interleave(self.group, 1)
        value = plain_norm(value).transpose(1, 2).repeat_interleave(self.group, 1)
        # Plain matrix products: in bfloat16 they beat the fused CPU kernel for rows this short.
        chance = (query @ key + mask).softmax(-1)
        out: Tensor = self.o_proj((chance @ value).transpose(1, 2).reshape(rows, tokens, -1))
        return out


class FeedForward(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, intermediate)
        self.up_proj = linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return out


class Router(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.proj = linear(shape.hidden, shape.experts)
        self.scale = nn.Parameter(torch.ones(shape.hidden))
        self.per_expert_scale = nn.Parameter(torch.ones(shape.experts))
        self.top_k = shape.top_k

    def forward(self, x: Tensor) -> Tensor:
        """Weights of all experts, (..., experts); zero outside the top k."""
        with torch.autocast("cpu", enabled=False):
            scores = self.proj(plain_norm(x.float()) * self.scale * x.shape[-1] ** -0.5)
        chance = scores.softmax(-1)
        kept = chance * (chance >= chance.topk(self.top_k, -1).values[..., -1:])
        out: Tensor = kept / kept.sum(-1, keepdim=True) * self.per_expert_scale
        return out


class Experts(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        count, inner, hidden = shape.experts, shape.expert_intermediate, shape.hidden
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) * inner**-0.5)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        count, hidden, inner = self.down_proj.shape
        both = F.linear(x, self.gate_up_proj.reshape(-1, hidden))
        both = both.view(*x.shape[:-1], count, 2, inner)
        out = gated(both[..., 0, :], both[..., 1, :]) * weight[..., None]
        return F.linear(out.flatten(-2), self.down_proj.transpose(0, 1).reshape(hidden, count * inner))


class Layer(nn.Module):
    def __init__(self, shape: Shape, layer_type: str) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer_type)
        self.mlp = FeedForward(shape.hidden, shape.dense_intermediate)
        self.router, self.experts = Router(shape), Experts(shape)
        self.input_layernorm = Norm(shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.pre_feedforward_layernorm = Norm(shape.hidden)
        self.pre_feedforward_layernorm_2 = Norm(shape.hidden)
        self.post_feedforward_layernorm = Norm(shape.hidden)
        self.post_feedforward_layernorm_1 = Norm(shape.hidden)
        self.post_feedforward_layernorm_2 = Norm(shape.hidden)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), self.router(x))
        both = dense + self.post_feedforward_layernorm_2(sparse)
        out: Tensor = (x + self.post_feedforward_layernorm(both)) * self.layer_scalar
        return out


class SelfConditioning(FeedForward):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.hidden, shape.dense_intermediate)
        self.pre_norm = Norm(shape.hidden)

    def combine(self, embedded: Tensor, soft: Tensor) -> Tensor:
        return plain_norm(embedded + self(self.pre_norm(soft)))


class TrainingModel(nn.Module):
    """Encoder and decoder rows in one forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_scale = math.sqrt(shape.hidden)
        self.embed_tokens = nn.Embedding(shape.vocab_tokens, shape.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=shape.hidden**-0.5)
        self.layers = nn.ModuleList(Layer(shape, shape.layer_type(index)) for index in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.self_conditioning = SelfConditioning(shape)

    def forward(
        self, tokens: Tensor, position: Tensor, masks: dict[str, Tensor], canvas: Tensor, soft: Tensor
    ) -> Tensor:
        """Soft-capped logits, float32 (rows, row_tokens, vocab).

        tokens, position: int64 (rows, row_tokens). canvas: bool, same shape. masks: per layer type, additive,
        float32 (rows, 1, row_tokens, row_tokens). soft: self-conditioning embeddings, float32
        (rows, row_tokens, hidden), zero where there is none.
        """
        embedded = self.embed_tokens(tokens) * self.embed_scale
        x = torch.where(canvas[..., None], self.self_conditioning.combine(embedded, soft), embedded)
        turns = {kind: self.turns(position, kind) for kind in masks}
        for index, layer in enumerate(self.layers):
            kind = self.shape.layer_type(index)
            x = layer(x, *turns[kind], masks[kind])
        with torch.autocast("cpu", enabled=False):
            logits = F.linear(self.norm(x.float()), self.embed_tokens.weight)
        return torch.tanh(logits / self.shape.softcap) * self.shape.softcap

    def turns(self, position: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 (rows, row_tokens, 1, head_dim)."""
        angle = position[..., None].float() * inverse_frequencies(self.shape, layer_type)
        angle = torch.cat((angle, angle), -1)[:, :, None]
        return angle.cos(), angle.sin()

    def soft_embeddings(self, logits: Tensor) -> Tensor:
        """Expected embeddings under softmax(logits), (..., hidden)."""
        out: Tensor = logits.float().softmax(-1) @ self.embed_tokens.weight * self.embed_scale
        return out
