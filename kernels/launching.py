"""What the launchers of all Triton kernels ask of their tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
"""Widest row that one program holds in registers."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter, where there need not be a card."""

FUSED = {"enable_fp_fusion": True}
"""Multiply and add in one rounding: Triton's default so far, which it announces to change, with a warning."""

E4M3_SM = (8, 9)
"""Triton converts to e4m3 from here on."""


def served(*tensors: Tensor | None) -> bool:
    """Whether Triton can work on these: rows of numbers, on a card unless they are interpreted."""
    there = [each for each in tensors if each is not None]
    return all((each.is_cuda or INTERPRETED) and each.is_floating_point() and each.stride(-1) == 1 for each in there)


def has_e4m3(device: torch.device) -> bool:
    """Whether kernels may write e4m3 there."""
    return INTERPRETED or torch.cuda.get_device_capability(device) >= E4M3_SM


def warps(block: int) -> int:
    """Warps for a row of `block` values: whole 16-byte loads, and few enough values a thread to stay in registers."""
    return min(max(block // 512, 1), 16)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Where Triton launches: it knows the current device alone."""
    return nullcontext() if INTERPRETED else torch.cuda.device_of(x)
