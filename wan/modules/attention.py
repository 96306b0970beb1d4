"""Upstream's doors to attention, `flash_attention` and `attention`: its arguments, on any device, with any length.

On a card with FlashAttention dense calls use it; everything else is PyTorch's attention, which here honours lengths,
windows and causality, and keeps float32 where upstream's fallback rounded to bfloat16.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from wan.engine.ops.attention import FLASH3, masked

__all__ = ["attention", "flash_attention"]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """Attention [B, L, N, D_v] in q's dtype for q [B, L, N, D], k [B, S, N_k, D] and v [B, S, N_k, D_v].

    N must be a multiple of N_k. `q_lens` and `k_lens` [B] are true lengths; outputs beyond `q_lens` are zero. On CUDA
    float32 inputs are computed in `dtype`, on the CPU in float32. `version` 2 or 3 asks for that FlashAttention.
    """
    out_dtype = q.dtype
    if causal:
        window_size = (window_size[0], 0)
    if q_scale is not None:
        q = q * q_scale
    if q.is_cuda and v.dtype not in (torch.float16, torch.bfloat16):
        v = v.to(dtype)
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q.is_cuda and q_lens is None and k_lens is None and dropout_p == 0:
        out = _flash(q, k, v, softmax_scale, window_size, deterministic, version)
        if out is not None:
            return out.to(out_dtype)
    lengths = (q_lens, k_lens)
    out = masked(q, k, v, lengths=lengths, window_size=window_size, scale=softmax_scale, dropout_p=dropout_p)
    return out.to(out_dtype)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window_size: tuple[int, int],
    deterministic: bool,
    version: int | None,
) -> Tensor | None:
    """What an installed FlashAttention gives, version 3 before 2; None where there is none."""
    two, three = ("flash_attn",), FLASH3
    for name in {None: (*three, *two), 2: two}.get(version, three):
        try:
            kernel = __import__(name).flash_attn_func
        except ImportError:
            continue
        causal, window = window_size[1] == 0, (window_size[0], -1 if window_size[1] == 0 else window_size[1])
        out = kernel(
            q, k, v, softmax_scale=scale, causal=causal, window_size=window, deterministic=deterministic
        )  # fmt: skip
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result
    if version is not None:
        warnings.warn(f"FlashAttention {version} is not installed; PyTorch's attention is used", stacklevel=3)
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fa_version: int | None = None,
) -> Tensor:
    """`flash_attention`; upstream has both names, and here one body serves them."""
    return flash_attention(
        q,
        k,
        v,
        q_lens,
        k_lens,
        dropout_p,
        softmax_scale,
        q_scale,
        causal,
        window_size,
        deterministic,
        dtype,
        fa_version,
    )
