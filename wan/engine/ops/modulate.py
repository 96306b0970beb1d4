"""Adaptive layer norm and gated residuals whose parameters are rows, one per distinct timestep.

A row serves every token of its timestep, so nothing is ever expanded to [B, L, 6, D] (9 GB for 14B at 720p).

Letters: B batch, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.ops.float8 import quantize_rows
from wan.engine.ops.op import Draw, op
from wan.engine.ops.rows import accumulate, in_runs, may_write, run_length, runs


class Norm(NamedTuple):
    """How x [B, L, D] is normed: LayerNorm(x) * weight + bias, computed in float32, as `dtype`.

    weight and bias are float32 [B, U, D], of which each token takes the row that `rows` [L] says, or the only one.
    """

    weight: Tensor
    bias: Tensor
    rows: Tensor | None
    eps: float
    dtype: torch.dtype = torch.float32


def pick(table: Tensor, rows: Tensor | None, at: slice | None = None) -> Tensor:
    """The row of every token `at`: [B, U, D] -> [B, L, D]; the only one there is, [B, 1, D], broadcasts."""
    return table if rows is None or table.shape[1] == 1 else table.index_select(1, rows if at is None else rows[at])


def _examples(draw: Draw) -> list[tuple[Tensor, Tensor, Tensor, Norm]]:
    """x, y, gate and norm: one row for all tokens, and tokens that choose theirs."""
    x, y, (gate, *tables) = draw(2, 5, 192), draw(2, 5, 192, dtype=torch.bfloat16), draw(3, 2, 1, 192)
    one = (x, y, gate, Norm(tables[0], tables[1], None, 1e-6, torch.bfloat16))
    x, (gate, *tables) = draw(1, 7, 1536), draw(1, 3, 6, 1536).unbind(2)[:3]
    rows = torch.tensor([2, 0, 0, 1, 2, 1, 1], device=x.device)
    return [one, (x, draw(1, 7, 1536, dtype=torch.bfloat16), gate, Norm(tables[0], tables[1], rows, 1e-6))]


@op(examples=lambda draw: [(x, norm) for x, _, _, norm in _examples(draw)], tolerance=1e-3)
def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """x, normed."""
    weight, bias, rows, eps, dtype = norm

    def normed(at: slice) -> Tensor:
        part = x[:, at].float()
        if bias.shape[:2] == (1, 1):
            # One row for all tokens is exactly an affine layer norm: one kernel instead of three.
            return F.layer_norm(part, x.shape[-1:], weight.flatten(), bias.flatten(), eps)
        alone = F.layer_norm(part, x.shape[-1:], eps=eps)
        return torch.addcmul(pick(bias, rows, at), alone, pick(weight, rows, at))

    return in_runs(normed, x, dtype)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, float32; x [B, L, D], shift and scale [B, U, D]."""
    return layer_norm(x, Norm(1 + scale, shift, rows, eps))


@op(examples=lambda draw: [(x, y, gate, norm.rows) for x, y, gate, norm in _examples(draw)], tolerance=1e-5)
def gated_add(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + y * gate, computed in float32, in x's dtype; written into `x` where that is allowed.

    x and y [B, L, D] of any float dtype, gate float32 [B, U, D].
    """
    if not may_write():
        return torch.addcmul(x, y, pick(gate, rows)).to(x.dtype)
    for at in runs(x.shape[1], run_length(x)):
        x[:, at].addcmul_(y[:, at], pick(gate, rows, at))
    return x


@op(examples=lambda draw: [(x, norm) for x, _, _, norm in _examples(draw)], tolerance=5e-3)
def layer_norm_quantize(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `layer_norm`: codes and scales."""
    return quantize_rows(layer_norm(x, norm))


@op(examples=_examples, tolerance=1e-3)
def gated_add_norm(x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """`gated_add`, without a gate `accumulate`, and `layer_norm` of what comes of it."""
    x = accumulate(x, y) if gate is None else gated_add(x, y, gate, norm.rows)
    return x, layer_norm(x, norm)


@op(examples=_examples, tolerance=5e-3)
def gated_add_norm_quantize(x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_add_norm`, whose norm is quantised: the sum, codes and scales."""
    x, normed = gated_add_norm(x, y, gate, norm)
    return x, *quantize_rows(normed)
