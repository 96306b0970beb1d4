"""Rows in 8 bits (e4m3), alone and behind tanh-GELU: one pass over a row.

A program holds one row of D values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import FUSED, MAX_WIDTH, has_e4m3, on_device_of, served, warps


@triton.jit
def to_codes(values):
    """float32 values as e4m3 codes and their scale: the largest becomes 448, the largest e4m3 number."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 0), 448.0), 1.1754943508222875e-38)
    return tl.div_rn(values, scale).to(tl.float8e4nv), scale


@triton.jit
def _quantize(x_ptr, codes_ptr, scale_ptr, D, x_r, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_r + at, mask=at < D, other=0.0).to(tl.float32)
    if GELU:
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # what is quantised has been rounded once, as by itself
    codes, scale = to_codes(x)
    tl.store(codes_ptr + row * D + at, codes, mask=at < D)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D] and scales [..., 1] of the rows of x."""
    return _launched(x, gelu=False)


def quantize_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of x's tanh-GELU; x is not written."""
    return _launched(x, gelu=True)


def _launched(x: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    if not served(x) or not has_e4m3(x.device) or width > MAX_WIDTH:
        return NotImplemented
    rows = x.flatten(0, -2) if x.ndim > 2 else x.view(-1, width)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with on_device_of(x):
        _quantize[(len(rows),)](
            rows, codes, scale, width, rows.stride(0), GELU=gelu, BLOCK=block, num_warps=warps(block), **FUSED
        )  # fmt: skip
    return codes, scale
