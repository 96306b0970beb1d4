"""Attention over [B, L, N, D] tensors: the plain path, the backends a card may offer, and who may be chosen.

Letters: B batch, L query tokens, S key tokens, N heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.types import Layout


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """PyTorch's scaled dot product attention; q [B, L, N, D], k and v [B, S, N, D] -> [B, L, N, D] in v's dtype."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def windowed(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None, *, window_size: tuple[int, int]) -> Tensor:
    """Plain attention in which a query sees `window_size` = (left, right) keys beside its own place; -1 is no limit."""
    mask = window_mask(q.shape[1], k.shape[1], window_size, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q.to(v.dtype), k.to(v.dtype), v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def window_mask(queries: int, keys: int, window_size: tuple[int, int], device: torch.device) -> Tensor:
    """[L, S], True where a query may look. Windows are aligned to the last query and key, as in FlashAttention."""
    left, right = window_size
    offset = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)
    mask = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        mask &= offset >= -left
    if right >= 0:
        mask &= offset <= right
    return mask
