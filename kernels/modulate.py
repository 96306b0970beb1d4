"""Residual, gate, layer norm and its weights by row: one pass over a token in place of one for each.

A program holds one token. Letters: B batch, L tokens, U rows of a table, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import FUSED, MAX_WIDTH, TYPES, has_e4m3, on_device_of, served, warps
from wan.kernels.quantize import to_codes


@triton.jit
def _residual_norm(
    x_ptr, y_ptr, out_ptr, codes_scale_ptr, gate_ptr, weight_ptr, bias_ptr, rows_ptr,
    L, D, x_b, x_l, y_b, y_l, gate_b, gate_u, weight_b, weight_u, bias_b, bias_u, eps,
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
        stored = (x + y).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + b * x_b + l * x_l + at, stored, mask=inside)
        x = stored.to(tl.float32)
    if NORM:
        centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        normed *= tl.load(weight_ptr + b * weight_b + row * weight_u + at, mask=inside, other=0.0).to(tl.float32)
        normed += tl.load(bias_ptr + b * bias_b + row * bias_u + at, mask=inside, other=0.0).to(tl.float32)
        out = normed.to(DTYPE)
        if CODES:  # of what has been rounded once, as the norm by itself would give it
            out, scale = to_codes(out.to(tl.float32))
            tl.store(codes_scale_ptr + token, scale)
        tl.store(out_ptr + token * D + at, out, mask=inside)


Norm = tuple[Tensor, Tensor, Tensor | None, float, torch.dtype]
"""Weight, bias, rows, eps and the dtype of what is normed."""


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm(x) * weight + bias; x is not written."""
    weight, bias, rows, eps, dtype = norm
    if not _takes(x, weight, bias, rows=rows):
        return NotImplemented
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, rows, eps, dtype, norm=(weight, bias, out))
    return out


def layer_norm_quantize(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Codes and scales of what `layer_norm` gives; x is not written."""
    weight, bias, rows, eps, dtype = norm
    if not _takes(x, weight, bias, rows=rows) or not has_e4m3(x.device):
        return NotImplemented
    codes, scale = _codes(x)
    _launch(x, rows, eps, dtype, norm=(weight, bias, codes), codes_scale=scale)
    return codes, scale


def gated_add(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + y * gate, in x."""
    if not _takes(x, y, gate, rows=rows):
        return NotImplemented
    _launch(x, rows, 0.0, x.dtype, y=y, gate=gate)
    return x


def gated_add_norm(x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """x + y * gate, in x, and `layer_norm` of that."""
    weight, bias, rows, eps, dtype = norm
    if not _takes(x, y, gate, weight, bias, rows=rows):
        return NotImplemented
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, rows, eps, dtype, y=y, gate=gate, norm=(weight, bias, out))
    return x, out


def gated_add_norm_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x + y * gate, in x, and codes and scales of `layer_norm` of that."""
    weight, bias, rows, eps, dtype = norm
    if not _takes(x, y, gate, weight, bias, rows=rows) or not has_e4m3(x.device):
        return NotImplemented
    codes, scale = _codes(x)
    _launch(x, rows, eps, dtype, y=y, gate=gate, norm=(weight, bias, codes), codes_scale=scale)
    return x, codes, scale


def _takes(x: Tensor, *others: Tensor | None, rows: Tensor | None) -> bool:
    return served(x, *others) and x.shape[-1] <= MAX_WIDTH and (rows is None or rows.stride(0) == 1)


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _launch(
    x: Tensor, rows: Tensor | None, eps: float, dtype: torch.dtype, *, y: Tensor | None = None,
    gate: Tensor | None = None, norm: tuple[Tensor, Tensor, Tensor] | None = None, codes_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """`norm` is weight, bias and where the result goes. What is not given is not read, written or done."""
    batch, length, width = x.shape
    weight, bias, out = norm or (None, None, None)
    block, tables = triton.next_power_of_2(width), (gate, weight, bias)
    pointers = [x if each is None else each for each in (y, out, codes_scale, *tables, rows)]
    strides = (0, 0) if y is None else y.stride()[:2]
    with on_device_of(x):
        _residual_norm[(batch * length,)](
            x, *pointers, length, width, *x.stride()[:2], *strides, *(s for t in tables for s in _strides(t)), eps,
            ADD=y is not None, GATE=gate is not None, NORM=norm is not None, CODES=codes_scale is not None,
            ROWS=rows is not None, DTYPE=TYPES[dtype], BLOCK=block, num_warps=warps(block), **FUSED,
        )  # fmt: skip


def _strides(table: Tensor | None) -> tuple[int, int]:
    """From sample to sample and from row to row; the only one of them serves all."""
    if table is None:
        return 0, 0
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(1) if table.shape[1] > 1 else 0
