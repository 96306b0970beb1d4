"""Adaptive layer norm and gated residuals whose parameters are rows, one per distinct timestep.

A row serves every token of its timestep, so nothing is ever expanded to [B, L, 6, D] (9 GB for 14B at 720p).

Letters: B batch, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pick(table: Tensor, rows: Tensor | None) -> Tensor:
    """The row of every token: [B, U, D] -> [B, L, D]; with `rows` None the single row [B, 1, D], which broadcasts."""
    return table if rows is None else table.index_select(1, rows)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32; x [B, L, D], shift and scale [B, U, D]."""
    shape = x.shape[-1:]
    if shift.shape[:2] == (1, 1):
        # One row for all tokens is exactly an affine layer norm: one kernel instead of three.
        return F.layer_norm(x.float(), shape, 1 + scale.flatten(), shift.flatten(), eps)
    normed = F.layer_norm(x.float(), shape, eps=eps)
    return torch.addcmul(pick(shift, rows), normed, pick(1 + scale, rows))


def gated_add(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + y * gate in float32; x float32 [B, L, D], y [B, L, D] of any float dtype, gate [B, U, D]."""
    return torch.addcmul(x, y, pick(gate, rows))
