"""What a text encoder computes between its matrix products: T5's norm, and feed-forward layers with a gate.

Letters: B batch, S text tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.ops.op import Draw, op

HALF = (torch.bfloat16, torch.float16)


def _norm_examples(draw: Draw) -> list[tuple[Any, ...]]:
    return [(draw(3, width, dtype=dtype), draw(width, dtype=dtype), 1e-6) for dtype in HALF for width in (4096, 193)]


def _gate_examples(draw: Draw) -> list[tuple[Any, ...]]:
    kinds = ("gelu", "silu")
    return [(draw(3, 129, dtype=dtype), draw(3, 129, dtype=dtype), kind) for dtype in HALF for kind in kinds]


# Kernels round once where the definition rounds after every operation: to bfloat16 that is 2^-8 each time.
@op(examples=_norm_examples, tolerance=1e-2)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, as the weight's dtype; the statistic is in float32."""
    normed = x * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(weight.dtype)


@op(examples=_gate_examples, tolerance=1e-2)
def gated(gate: Tensor, up: Tensor, activation: Literal["gelu", "silu"]) -> Tensor:
    """activation(gate) * up; "gelu" is the tanh form."""
    return (F.gelu(gate, approximate="tanh") if activation == "gelu" else F.silu(gate)) * up
