"""Root mean square norm of a token and the turning of its heads' pairs: one pass, written over the projection, or in
8 bits beside it.

A program holds all heads of one token. Letters: B batch, L tokens, D width of all heads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import FUSED, MAX_WIDTH, has_e4m3, on_device_of, served, warps


@triton.jit
def _norm_rotate(
    x_ptr, weight_ptr, rope_ptr, codes_ptr, scale_ptr, L, D, x_b, x_l, eps, bound,
    NORM: tl.constexpr, ROPE: tl.constexpr, CODES: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, l = token // L, token % L
    at = tl.arange(0, BLOCK)
    inside = at < D
    x_ptr += b * x_b + l * x_l
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x *= weight
    if ROPE:
        # Loaded as it lies, cosine and sine by turns, and split in registers: strided loads would be 4 bytes each.
        turn = tl.load(rope_ptr + l * HEAD + at % HEAD, mask=inside, other=0.0)
        cos, sin = tl.split(tl.reshape(turn, (BLOCK // 2, 2)))
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    rounded = x.to(x_ptr.dtype.element_ty)
    if CODES:
        head = tl.arange(0, BLOCK // HEAD)
        scale = tl.max(tl.reshape(tl.abs(weight), (BLOCK // HEAD, HEAD)), 1) * bound
        scale = tl.maximum(scale, 1.1754943508222875e-38)
        if l == 0:
            tl.store(scale_ptr + b * (D // HEAD) + head, scale, mask=head < D // HEAD)
        heads = tl.reshape(rounded.to(tl.float32), (BLOCK // HEAD, HEAD))
        codes = tl.reshape(tl.div_rn(heads, tl.broadcast_to(scale[:, None], (BLOCK // HEAD, HEAD))), (BLOCK,))
        tl.store(codes_ptr + token * D + at, codes.to(tl.float8e4nv), mask=inside)
    else:
        tl.store(x_ptr + at, rounded, mask=inside)


def norm_rotate(x: Tensor, weight: Tensor | None, rope: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """The heads [B, L, N, D / N] of x [B, L, D], normed and turned where they stand."""
    if not _takes(x, weight, rope):
        return NotImplemented
    _launch(x, weight, rope, num_heads, eps)
    return x.unflatten(-1, (num_heads, -1))


def norm_rotate_quantize(
    x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Codes [B, L, N, D / N] and scales [B, N] of the same heads; x is not written."""
    head = x.shape[-1] // num_heads
    if not _takes(x, weight, rope) or not has_e4m3(x.device) or head & (head - 1):
        return NotImplemented
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], num_heads, dtype=torch.float32, device=x.device)
    _launch(x, weight, rope, num_heads, eps, codes=codes, scale=scale)
    return codes.unflatten(-1, (num_heads, -1)), scale


def _takes(x: Tensor, weight: Tensor | None, rope: Tensor | None) -> bool:
    return served(x, weight, rope) and x.shape[-1] <= MAX_WIDTH and (rope is None or rope.is_contiguous())


def _launch(
    x: Tensor, weight: Tensor | None, rope: Tensor | None, num_heads: int, eps: float, *,
    codes: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    batch, length, width = x.shape
    block, pointers = triton.next_power_of_2(width), (weight, rope, codes, scale)
    with on_device_of(x):
        _norm_rotate[(batch * length,)](
            x, *(x if each is None else each for each in pointers), length, width, *x.stride()[:2], eps,
            math.sqrt(width) / 448, NORM=weight is not None, ROPE=rope is not None, CODES=codes is not None,
            HEAD=width // num_heads, BLOCK=block, num_warps=warps(block), **FUSED,
        )  # fmt: skip
