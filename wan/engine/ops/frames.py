"""Cross-attention frame by frame: a token looks at what belongs to its own latent frame (sound, a face) and no other.

The tokens may be any part of the sequence in any order, so whoever splits a sequence need not align it to frames.

Letters: B batch, L tokens, T frames, S entries a frame, N heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_own_frame"]


def attend_own_frame(q: Tensor, k: Tensor, v: Tensor, frames: Tensor) -> Tensor:
    """[B, L, N, D]: queries [B, L, N, D] over the entries k and v [B, T, S, N, D] of the frame `frames` [L] says.

    What tokens of no frame (-1) get means nothing. All frames' entries are few, so a mask costs less than a gather.
    """
    owner = torch.arange(k.shape[1], device=frames.device).repeat_interleave(k.shape[2])
    mask = (frames[:, None] == owner) | (frames < 0)[:, None]  # a row without any entry would be NaN
    k, v = (each.flatten(1, 2).transpose(1, 2) for each in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)
