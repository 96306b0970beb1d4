"""Residual, gate, layer norm and modulation: one pass over a token in place of one for each.

A program holds one token. Letters: B batch, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import FUSED, MAX_WIDTH, TYPES, has_e4m3, served, warps
from wan.kernels.quantize import to_codes


@triton.jit
def _residual_norm(
    x_ptr, y_ptr, out_ptr, codes_scale_ptr, gate_ptr, scale_ptr, shift_ptr, rows_ptr,
    L, D, x_b, x_l, y_b, y_l, gate_b, gate_u, scale_b, scale_u, shift_b, shift_u, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
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
        if CODES:
            # What is quantised has been rounded once, as the norm by itself would give it.
            codes, row_scale = to_codes(tl.where(inside, made.to(DTYPE).to(tl.float32), 0.0))
            tl.store(out_ptr + token * D + at, codes, mask=inside)
            tl.store(codes_scale_ptr + token, row_scale)
        else:
            tl.store(out_ptr + token * D + at, made.to(DTYPE), mask=inside)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """LayerNorm(x) * (1 + scale) + shift; x is not written."""
    if not _takes(x, shift, scale, rows=rows):
        return NotImplemented
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, rows, eps, dtype, shift=shift, scale=scale, out=out)
    return out


def norm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scales of what `norm_modulate` gives; x is not written."""
    if not _takes(x, shift, scale, rows=rows) or not has_e4m3(x.device):
        return NotImplemented
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _launch(x, rows, eps, dtype, shift=shift, scale=scale, out=codes, row_scale=row_scale)
    return codes, row_scale


def gated_add(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + y * gate, in x."""
    if not _takes(x, y, gate, rows=rows):
        return NotImplemented
    _launch(x, rows, 0.0, x.dtype, y=y, gate=gate)
    return x


def gated_add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: Tensor | None = None,
    eps: float = 1e-6, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + y * gate, in x, and LayerNorm of that, modulated."""
    if not _takes(x, y, gate, shift, scale, rows=rows):
        return NotImplemented
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, rows, eps, dtype, y=y, gate=gate, shift=shift, scale=scale, out=out)
    return x, out


def _takes(x: Tensor, *others: Tensor | None, rows: Tensor | None) -> bool:
    return served(x, *others) and x.shape[-1] <= MAX_WIDTH and (rows is None or rows.stride(0) == 1)


def _launch(
    x: Tensor, rows: Tensor | None, eps: float, dtype: torch.dtype, *, y: Tensor | None = None,
    gate: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None, out: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """What is not given is not read, written or done."""
    batch, length, width = x.shape
    block, tables = triton.next_power_of_2(width), (gate, scale, shift)
    # A table of one batch serves all.
    strides = [s for t in tables for s in ((0, 0) if t is None else t.expand(batch, -1, -1).stride()[:2])]
    pointers = [x if each is None else each for each in (y, out, row_scale, *tables, rows)]
    _residual_norm[(batch * length,)](
        x, *pointers, length, width, *x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]), *strides, eps,
        ADD=y is not None, GATE=gate is not None, NORM=scale is not None, CODES=row_scale is not None,
        ROWS=rows is not None, DTYPE=TYPES[dtype], BLOCK=block, num_warps=warps(block), **FUSED,
    )  # fmt: skip
