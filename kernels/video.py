"""What surrounds the convolutions of a video VAE, on channels-last frames: one pass over what a convolution reads.

A program holds some places of one row of an image, all channels. Letters: B batch, C channels, T frames, H, W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.launching import FUSED, on_device_of, served

TILE = 4096
"""Values of a program."""
MAX_CHANNELS = 2048


@triton.jit
def _place(T, H, s_b, s_t, s_h):
    """Where the row of an image stands that this program works on."""
    row = tl.program_id(0).to(tl.int64)
    return row // (T * H) * s_b + row // H % T * s_t + row % H * s_h


@triton.jit
def _norm_silu(
    x_ptr, gamma_ptr, out_ptr, T, H, W, C, x_b, x_t, x_h, x_w, out_b, out_t, out_h, out_w,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    w, c = tl.program_id(1) * PLACES + tl.arange(0, PLACES)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (w < W) & (c < C)
    x = tl.load(x_ptr + _place(T, H, x_b, x_t, x_h) + w * x_w + c, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.maximum(tl.sum(x * x, 1, keep_dims=True), 1e-24) / C)
    x *= inverse * tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    x *= tl.sigmoid(x)
    out_ptr += _place(T, H, out_b, out_t, out_h)
    tl.store(out_ptr + w * out_w + c, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_bias(
    y_ptr, bias_ptr, other_ptr, T, H, W, C, y_b, y_t, y_h, y_w, other_b, other_t, other_h, other_w,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    w, c = tl.program_id(1) * PLACES + tl.arange(0, PLACES)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (w < W) & (c < C)
    y_ptr += _place(T, H, y_b, y_t, y_h)
    y = tl.load(y_ptr + w * y_w + c, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    other_ptr += _place(T, H, other_b, other_t, other_h)
    y += tl.load(other_ptr + w * other_w + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + w * y_w + c, y.to(y_ptr.dtype.element_ty), mask=inside)


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU of x [B, C, T, H, W] of unit RMS over its channels times gamma; written into `out` if given."""
    out = torch.empty_like(x) if out is None else out
    return _launched(_norm_silu, x, gamma, out, out)


def convolve_add(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, ...], other: Tensor) -> Tensor:
    """A convolution of x, and its bias and `other` added in one pass."""
    if not served(x.movedim(1, -1), other.movedim(1, -1)):
        return NotImplemented
    y = F.conv3d(x, weight, None, padding=padding)
    made = add_bias(y, bias, other)
    return y.add_(bias.view(-1, 1, 1, 1)).add_(other) if made is NotImplemented else made


def add_bias(y: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """y + bias + other, in y; all [B, C, T, H, W] but the bias [C]."""
    return _launched(_add_bias, y, bias, other, y)


def _launched(kernel: triton.JITFunction, x: Tensor, vector: Tensor, second: Tensor, result: Tensor) -> Tensor:
    tensors = [each.movedim(1, -1) for each in (x, second)]
    vector = vector.flatten()
    if x.ndim != 5 or not served(*tensors, vector) or x.shape[1] > MAX_CHANNELS:
        return NotImplemented
    batch, frames, height, width, channels = tensors[0].shape
    block = triton.next_power_of_2(channels)
    places = max(1, min(TILE // block, triton.next_power_of_2(width)))
    strides = [stride for each in tensors for stride in each.stride()[:4]]
    with on_device_of(x):
        kernel[(batch * frames * height, triton.cdiv(width, places))](
            tensors[0], vector, tensors[1], frames, height, width, channels, *strides,
            PLACES=places, BLOCK=block, **FUSED,
        )  # fmt: skip
    return result
