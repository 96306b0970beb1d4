"""Root mean square norm of a token and the turning of its heads' pairs: one pass, written over the projection.

A program holds all heads of one token. Letters: B batch, L tokens, D width of all heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import FUSED, MAX_WIDTH, on_device_of, served, warps


@triton.jit
def _norm_rotate(
    x_ptr, weight_ptr, rope_ptr, L, D, x_b, x_l, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, l = token // L, token % L
    at = tl.arange(0, BLOCK)
    inside = at < D
    x_ptr += b * x_b + l * x_l
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        # Loaded as it lies, cosine and sine by turns, and split in registers: strided loads would be 4 bytes each.
        turn = tl.load(rope_ptr + l * HEAD + at % HEAD, mask=inside, other=0.0)
        cos, sin = tl.split(tl.reshape(turn, (BLOCK // 2, 2)))
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


def norm_rotate(x: Tensor, weight: Tensor | None, rope: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """The heads [B, L, N, D / N] of x [B, L, D], normed and turned where they stand."""
    batch, length, width = x.shape
    head = width // num_heads
    if not served(x, weight, rope) or width > MAX_WIDTH or not (rope is None or rope.is_contiguous()):
        return NotImplemented
    block = triton.next_power_of_2(width)
    with on_device_of(x):
        _norm_rotate[(batch * length,)](
            x, x if weight is None else weight, x if rope is None else rope, length, width, *x.stride()[:2], eps,
            NORM=weight is not None, ROPE=rope is not None, HEAD=head, BLOCK=block, num_warps=warps(block), **FUSED,
        )  # fmt: skip
    return x.unflatten(-1, (num_heads, head))
