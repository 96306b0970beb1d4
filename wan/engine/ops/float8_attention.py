"""Attention in 8 bits: how queries, keys and values become e4m3, and what a kernel is to make of them.

Keys lose their mean over all tokens first. It adds the same to all scores of a query, which softmax does not see, and
it is what makes some channels of keys far larger than the rest. One scale serves a head. Sources: SageAttention,
arXiv:2410.02367 (smoothed keys); FlashAttention 3, arXiv:2407.08608 (probabilities in e4m3).

Letters: B batch, L query tokens, S key tokens, N heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan.engine.ops.float8 import E4M3, LARGEST, TINY, Quantized
from wan.engine.ops.rows import in_runs
from wan.engine.types import Layout

__all__ = ["attend_float8", "quantize_heads", "quantize_qkv"]

PROBABILITY_SCALE = 256.0
"""The largest probability of a row becomes this before it is rounded to e4m3, as in FlashAttention 3."""

Three = tuple[Tensor, Tensor, Tensor]


def quantize_qkv(q: Tensor | Quantized, k: Tensor, v: Tensor, *, smooth: bool = True) -> tuple[Three, Three]:
    """e4m3 codes of q [B, L, N, D], k and v [B, S, N, D], and scales [B, N]; `smooth` takes the mean off the keys.

    Queries may be in codes already, with scales of that form.
    """
    if smooth:
        mean = k.mean(1, keepdim=True, dtype=torch.float32)
        k = in_runs(lambda at: k[:, at].float() - mean, k, k.dtype)
    qc, qs = (q.codes, q.scale) if isinstance(q, Quantized) else quantize_heads(q)
    (kc, ks), (vc, vs) = quantize_heads(k), quantize_heads(v)
    return (qc, kc, vc), (qs, ks, vs)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of x [B, L, N, D] and scales [B, N]: the largest value of a head becomes the largest number."""
    largest = torch.linalg.vector_norm(x, math.inf, dim=(1, 3), dtype=torch.float32)
    scale = (largest / LARGEST).clamp(min=TINY)
    return in_runs(lambda at: x[:, at].float() / scale[:, None, :, None], x, E4M3), scale


def attend_float8(
    q: Tensor | Quantized, k: Tensor, v: Tensor, layout: Layout | None = None, *, smooth: bool = True
) -> Tensor:
    """The definition: products of e4m3 summed in float32, probabilities in e4m3, their sum before that rounding.

    A kernel that walks along the keys rounds its probabilities by the largest score so far; here it is that of the row.
    """
    (qc, kc, vc), (qs, ks, vs) = quantize_qkv(q, k, v, smooth=smooth)
    scores = torch.einsum("blnd,bsnd->bnls", qc.float(), kc.float())
    scores *= (qs * ks)[..., None, None] / math.sqrt(k.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * PROBABILITY_SCALE
    out = torch.einsum("bnls,bsnd->bnld", weights.to(E4M3).float(), vc.float())
    return (out * (vs[..., None, None] / weights.sum(-1, keepdim=True))).transpose(1, 2).to(q.dtype)
