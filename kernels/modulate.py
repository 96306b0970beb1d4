"""Residual, gate, layer norm and modulation: one pass over a token in place of one for each.

A program holds one token. Letters: B batch, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import MAX_WIDTH, served, warps


@triton.jit
def _residual_norm(
    x_ptr, y_ptr, out_ptr, gate_ptr, scale_ptr, shift_ptr, rows_ptr,
    L, D, x_b, x_l, y_b, y_l, gate_b, gate_u, scale_b, scale_u, shift_b, shift_u, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, l = token // L, token % L
    row = tl.load(rows_ptr + l) if ROWS else 0
    at = tl.arange(0, BLOCK)
    inside = at < D
    x = tl.load(x_ptr + b * x_b + l * x_l + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + b * y_b + l * y_l + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            y *= tl.load(gate_ptr + b * gate_b + row * gate_u + at, mask=inside, other=0.0).to(tl.float32)
        x += y
        stored = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + b * x_b + l * x_l + at, stored, mask=inside)
        x = stored.to(tl.float32)
    if NORM:
        mean = tl.sum(x, 0) / D
        centred = tl.where(inside, x - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        scale = tl.load(scale_ptr + b * scale_b + row * scale_u + at, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_b + row * shift_u + at, mask=inside, other=0.0).to(tl.float32)
        made = centred * deviation * (1.0 + scale) + shift
        tl.store(out_ptr + token * D + at, made.to(out_ptr.dtype.element_ty), mask=inside)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """LayerNorm(x) * (1 + scale) + shift; x is not written."""
    return _launched(x, None, None, shift, scale, rows, eps, dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + y * gate, in x."""
    made = _launched(x, y, gate, None, None, rows, 0.0, x.dtype)
    return made if made is NotImplemented else x


def gated_add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: Tensor | None = None,
    eps: float = 1e-6, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + y * gate, in x, and LayerNorm of that, modulated."""
    made = _launched(x, y, gate, shift, scale, rows, eps, dtype)
    return made if made is NotImplemented else (x, made)  # type: ignore[return-value]


def _launched(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    rows: Tensor | None, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The normed tokens; x itself where none are asked for."""
    batch, length, width = x.shape
    if not served(x, y, gate, shift, scale) or width > MAX_WIDTH or (rows is not None and rows.stride(0) != 1):
        return NotImplemented
    out = x if scale is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    y_strides = (0, 0) if y is None else y.stride()[:2]
    tables = (gate, scale, shift)
    # A table of one batch serves all.
    strides = [s for t in tables for s in ((0, 0) if t is None else t.expand(batch, -1, -1).stride()[:2])]
    block = triton.next_power_of_2(width)
    _residual_norm[(batch * length,)](
        x, x if y is None else y, out, *(x if t is None else t for t in tables), x if rows is None else rows,
        length, width, *x.stride()[:2], *y_strides, *strides, eps,
        ADD=y is not None, GATE=gate is not None, NORM=scale is not None, ROWS=rows is not None, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return out
