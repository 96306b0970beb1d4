"""Root mean square norm of tokens, alone and together with the rotary embedding of the heads it is followed by.

Letters: B batch, L tokens, N heads, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.ops.float8 import E4M3, LARGEST, TINY
from wan.engine.ops.op import Draw, op
from wan.engine.ops.rope import rotate
from wan.engine.ops.rows import in_runs

__all__ = ["norm_rotate", "norm_rotate_quantize", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Unit RMS over the last dim of x, times weight; statistics in float32, the weight applied in the input's dtype."""
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def _examples(draw: Draw) -> list[tuple[Any, ...]]:
    """Queries out of a common buffer with queries, keys and values; keys of a text, which are not turned."""
    q = draw(2, 5, 3 * 256, dtype=torch.bfloat16)[..., :256]
    angles = draw(5, 1, 64)
    return [
        (q, draw(256), torch.stack((angles.cos(), angles.sin()), -1), 2, 1e-6),
        (draw(1, 7, 1536, dtype=torch.bfloat16), draw(1536, dtype=torch.bfloat16), None, 12, 1e-6),
    ]


@op(examples=_examples, tolerance=1e-2)
def norm_rotate(x: Tensor, weight: Tensor | None, rope: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """The heads [B, L, N, D / N] of a projection x [B, L, D] just made, normed and turned; may be written over it.

    Without `weight` they are not normed, without `rope` [L, 1, D / N / 2, 2] not turned.
    """
    into = x.unflatten(-1, (num_heads, -1))

    def part(at: slice) -> Tensor:
        normed = x[:, at] if weight is None else rms_norm(x[:, at], weight, eps)
        heads = normed.unflatten(-1, (num_heads, -1))
        return heads if rope is None else rotate(heads, rope[at])

    return in_runs(part, into, x.dtype, into)


@op(examples=_examples, tolerance=2e-2)
def norm_rotate_quantize(
    x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`norm_rotate` in e4m3 codes [B, L, N, D / N] and a scale for each head [B, N], which the weights alone decide.

    No pair of a row with unit RMS is longer than sqrt(D), and turning keeps its length: nothing has to be read to know
    a scale that suffices. It is some ten times what is needed, which costs e4m3, whose digits float, the digits of
    values 400 times smaller than the usual and nothing else.
    """
    largest = weight.float().abs().view(num_heads, -1).amax(-1)
    scale = (largest * (math.sqrt(x.shape[-1]) / LARGEST)).clamp(min=TINY)
    heads = norm_rotate(x, weight, rope, num_heads, eps)
    codes = in_runs(lambda at: heads[:, at].float() / scale[:, None], heads, E4M3)
    return codes, scale.expand(len(x), -1).contiguous()
