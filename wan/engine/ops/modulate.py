"""Adaptive layer norm and gated residuals whose parameters are rows, one per distinct timestep.

A row serves every token of its timestep, so nothing is ever expanded to [B, L, 6, D] (9 GB for 14B at 720p).

Letters: B batch, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.ops.rows import in_runs, may_write, run_length, runs


def pick(table: Tensor, rows: Tensor | None, at: slice | None = None) -> Tensor:
    """The row of every token `at`: [B, U, D] -> [B, L, D]; with `rows` None the single [B, 1, D], which broadcasts."""
    return table if rows is None else table.index_select(1, rows if at is None else rows[at])


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, computed in float32, as `dtype`; x [B, L, D], shift and scale [B, U, D]."""
    shape, scale = x.shape[-1:], 1 + scale

    def modulated(at: slice) -> Tensor:
        part = x[:, at].float()
        if shift.shape[:2] == (1, 1):
            # One row for all tokens is exactly an affine layer norm: one kernel instead of three.
            return F.layer_norm(part, shape, scale.flatten(), shift.flatten(), eps)
        normed = F.layer_norm(part, shape, eps=eps)
        return torch.addcmul(pick(shift, rows, at), normed, pick(scale, rows, at))

    return in_runs(modulated, x, dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + y * gate in float32, written into `x` where that is allowed.

    x float32 [B, L, D], y [B, L, D] of any float dtype, gate [B, U, D].
    """
    if not may_write():
        return torch.addcmul(x, y, pick(gate, rows))
    for at in runs(x.shape[1], run_length(x)):
        x[:, at].addcmul_(y[:, at], pick(gate, rows, at))
    return x
