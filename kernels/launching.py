"""What the launchers of all Triton kernels ask of their tensors."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MAX_WIDTH = 16384
"""Widest row that one program holds in registers."""

E4M3_SM = (8, 9)
"""Triton converts to e4m3 from here on."""


def served(*tensors: Tensor | None) -> bool:
    """Whether Triton can work on these where they are; under its interpreter that is anywhere."""
    there = [each for each in tensors if each is not None]
    return (all(each.is_cuda for each in there) or interpreted()) and all(
        each.is_floating_point() and each.stride(-1) == 1 for each in there
    )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def has_e4m3(device: torch.device) -> bool:
    """Whether kernels may write e4m3 there."""
    return interpreted() or torch.cuda.get_device_capability(device) >= E4M3_SM


def warps(block: int) -> int:
    """Warps for a row of `block` values: whole 16-byte loads, and few enough values a thread to stay in registers."""
    return min(max(block // 512, 1), 16)
