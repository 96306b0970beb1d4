"""Operations in fewer passes over memory than their definitions make on a CPU, out of PyTorch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.engine.ops.rows import in_runs

__all__ = ["norm_rotate"]


def norm_rotate(x: Tensor, weight: Tensor | None, rope: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """Norm, weight and turn in one float32 copy that is written where it stands, and one rounding at the end.

    In float32, where it is bits that count, the definition's own are kept.
    """
    if weight is None or x.device.type != "cpu" or x.dtype == torch.float32:
        return NotImplemented
    weight = weight.float()

    def part(at: slice) -> Tensor:
        values = x[:, at]
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        values = values.float().mul_(scale).mul_(weight)
        heads = values.unflatten(-1, (num_heads, -1))
        if rope is not None:
            pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
            heads = torch.view_as_real(pairs.mul_(torch.view_as_complex(rope[at]))).flatten(-2)
        return heads

    into = x.unflatten(-1, (num_heads, -1))
    return in_runs(part, into, x.dtype, into)
