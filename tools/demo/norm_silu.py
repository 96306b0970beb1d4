"""One fused CPU operation for VAE training: RMS norm, SiLU and two zero frames in front.

Most of a training step's time on a CPU goes into this chain when torch runs it op by op. Where no C++ compiler is at
hand, or for other dtypes and devices, plain torch does the same.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAD_FRAMES = 2
_WIDTHS = (8, 12, 16, 24, 32, 48, 64)


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    source = Path(__file__).with_suffix(".cpp")
    target = Path(tempfile.mkdtemp(prefix="norm_silu_")) / "norm_silu.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        batch, width, frames, height, breadth = x.shape
        gamma = gamma.float().flatten().contiguous()
        out = torch.empty(
            batch, width, frames + PAD_FRAMES, height, breadth, dtype=x.dtype, memory_format=torch.channels_last_3d
        )
        ctx.save_for_backward(x, gamma)
        plane = height * breadth
        _call("norm_silu_forward", (x, gamma, out), batch, frames * plane, PAD_FRAMES * plane, width)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, gamma = ctx.saved_tensors
        batch, width, frames, height, breadth = x.shape
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        dx, dgamma = torch.empty_like(x), torch.empty_like(gamma)
        plane = height * breadth
        _call("norm_silu_backward", (x, gamma, grad, dx, dgamma), batch, frames * plane, PAD_FRAMES * plane, width)
        return dx, dgamma.view(-1, 1, 1, 1)


def _call(name: str, tensors: tuple[Tensor, ...], *numbers: int) -> None:
    library = _library()
    assert library is not None
    *longs, width = numbers
    arguments = [ctypes.c_void_p(t.data_ptr()) for t in tensors] + [ctypes.c_long(n) for n in longs]
    if getattr(library, name)(*arguments, ctypes.c_int(width)):
        raise ValueError(f"{name}: no code for {width} channels, add it to FOR_WIDTH")


def norm_silu_pad(x: Tensor, gamma: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, C, T + 2, H, W]: x / rms(x) * gamma through SiLU, after two frames of zeros."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[1] in _WIDTHS and _library() is not None:
        return _NormSilu.apply(x, gamma.float())
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-12)
    return F.pad(F.silu(wide * scale * gamma.float()).to(x.dtype), (0, 0, 0, 0, PAD_FRAMES, 0))
