"""The layers umT5 is made of: norm, attention, feed-forward and the position table, with T5's initial weights.

Letters: B batch, S text tokens, D width, N heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.ops.encoder import gated, rms_norm

MAX_DISTANCE = 128


def fp16_clamp(x: Tensor) -> Tensor:
    """`x` with float16 overflow pulled back into range; other dtypes pass unchanged."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(-limit, limit)


def relative_buckets(num_queries: int, num_keys: int, num_buckets: int, bidirectional: bool = True) -> Tensor:
    """The row of the position table for each (query, key) pair: [num_queries, num_keys] int64, on the CPU.

    Distances up to a quarter (half, when not bidirectional) of the buckets have their own; farther ones share buckets
    in logarithmic steps up to 128 tokens.
    """
    distance = torch.arange(num_keys)[None, :] - torch.arange(num_queries)[:, None]
    offset = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # float64 and a nudge: ln 2 / ln 16 * 8 must be 2, not 1.9999999, whatever the platform's logarithm.
    ratio = torch.log(distance.clamp(min=1).double() / exact) / math.log(MAX_DISTANCE / exact)
    far = exact + (ratio * (num_buckets - exact) + 1e-9).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class T5LayerNorm(nn.Module):
    """Root-mean-square norm: no mean, no bias; the statistic is taken in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class T5Attention(nn.Module):
    """Multi-head attention without 1/sqrt(d) scaling and without biases."""

    def __init__(self, dim: int, dim_attn: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if dim_attn % num_heads:
            raise BadCheckpoint(f"attention width {dim_attn!r} is not divisible by {num_heads!r} heads.")
        self.dim = dim
        self.dim_attn = dim_attn
        self.num_heads = num_heads
        self.head_dim = dim_attn // num_heads
        self.dropout = dropout
        self.q = nn.Linear(dim, dim_attn, bias=False)
        self.k = nn.Linear(dim, dim_attn, bias=False)
        self.v = nn.Linear(dim, dim_attn, bias=False)
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [B, Sq, D], context [B, Sk, D] (self-attention when None), bias [1 or B, N, Sq, Sk] -> [B, Sq, D]."""
        context = x if context is None else context
        q, k, v = (
            layer(source).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        dropout = self.dropout if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """fc2(fc1(x) * gelu_tanh(gate(x))), without biases."""

    def __init__(self, dim: int, dim_ffn: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = dim
        self.dim_ffn = dim_ffn
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(gated(self.gate[0](x), self.fc1(x), "gelu")))


class T5RelativeEmbedding(nn.Module):
    """A learned attention bias for each bucket of relative position and head."""

    def __init__(self, num_buckets: int, num_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.num_heads = num_heads
        self.bidirectional = bidirectional
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """The bias [1, N, num_queries, num_keys] for `relative_buckets`, the same for every layer of a network."""
        return self.embedding(buckets).permute(2, 0, 1).unsqueeze(0).contiguous()


def hide(bias: Tensor, visible: Tensor) -> Tensor:
    """`bias` with the dtype's minimum where `visible` (bool, broadcastable) is False."""
    # Set, not added: the dtype's minimum plus a negative bias would overflow to -inf in half precision.
    return bias.masked_fill(~visible, torch.finfo(bias.dtype).min)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Draw the initial weights of one layer in place (T5's scales: no later scaling of logits)."""
    if isinstance(module, T5Attention):
        module.q.weight.normal_(std=(module.dim * module.head_dim) ** -0.5)
        module.k.weight.normal_(std=module.dim**-0.5)
        module.v.weight.normal_(std=module.dim**-0.5)
        module.o.weight.normal_(std=module.dim_attn**-0.5)
    elif isinstance(module, T5FeedForward):
        module.gate[0].weight.normal_(std=module.dim**-0.5)
        module.fc1.weight.normal_(std=module.dim**-0.5)
        module.fc2.weight.normal_(std=module.dim_ffn**-0.5)
    elif isinstance(module, T5RelativeEmbedding):
        module.embedding.weight.normal_(std=(2 * module.num_buckets * module.num_heads) ** -0.5)
