"""What the layers of a video VAE compute, as functions of tensors: norm, convolution and attention, and other ways to
do the same that optimisations put in their places.

Letters: B batch, C, D channels in and out, T frames, H height, W width, L places of a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.op import Draw, op
from wan.engine.ops.rows import runs

__all__ = [
    "Behind", "attend_by_products", "attend_places", "behind", "convolve", "convolve_add", "doubling_weight",
    "enlarge_at_once", "frames_like", "norm_silu", "resample", "rms_norm", "shrink_unpadded", "with_past",
    "written_behind",
]  # fmt: skip

Behind = Callable[[Any, Tensor, Tensor, Any, Tensor | None], Tensor]
"""`(layer, gamma, x, cache, other) -> y`: a causal convolution behind a norm and SiLU, and what it remembers of a
stream; `other` is added if there is one."""

SCORES = 2**28
"""Attention scores that are kept at a time: 512 MiB in half precision, one frame of a 1280x720 video."""


def rms_norm(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """Unit RMS over the channels (dim 1) of x, times gamma; written into `out` if given."""
    # One sum of squares instead of F.normalize, whose norm over dim 1 is ten times slower on the CPU; the floor is
    # F.normalize's eps 1e-12, squared.
    # In half precision the squares would overflow (from 256 on in float16), so there it is the norm after all.
    if x.dtype in (torch.float16, torch.bfloat16):
        square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square()
    else:
        square = x.square().sum(dim=1, keepdim=True)
    inverse = (square.clamp_min(1e-24) / x.shape[1]).rsqrt().to(x.dtype)
    return torch.mul(x, inverse, out=out).mul_(gamma)


def _normed(draw: Draw) -> list[tuple[Any, ...]]:
    x, out = draw(1, 20, 2, 3, 5, dtype=torch.bfloat16), draw(1, 20, 4, 3, 5, dtype=torch.bfloat16)
    x, out = (each.contiguous(memory_format=torch.channels_last_3d) for each in (x, out))
    return [(x, draw(20, 1, 1, 1)), (x, draw(20, 1, 1, 1), out[:, :, 2:])]


@op(examples=_normed, tolerance=1e-2)
def norm_silu(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU of x's `rms_norm`; written into `out` if given."""
    normed = rms_norm(x, gamma, out)
    return F.silu(normed, inplace=not normed.requires_grad)


def convolve(x: Tensor, layer: nn.Conv3d) -> Tensor:
    """The layer's 3-D convolution of x."""
    return _convolved(x, layer.weight, layer.bias, cast("tuple[int, ...]", layer.padding), layer.stride)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...] = (1, 1, 1)
) -> Tensor:
    # PyTorch keeps float32 with batch 1 and a small input away from oneDNN (aten/native/Convolution.cpp,
    # `use_mkldnn`); the fallback is 3 to 8 times slower and all that a short clip on the CPU would use.
    small = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if small and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _joined(draw: Draw) -> list[tuple[Any, ...]]:
    x, weight, other = draw(1, 20, 4, 5, 6), 0.05 * draw(24, 20, 3, 3, 3), draw(1, 24, 2, 5, 6)
    x, weight, other = (each.bfloat16().contiguous(memory_format=torch.channels_last_3d) for each in (x, weight, other))
    return [(x, weight, draw(24, dtype=torch.bfloat16), (0, 1, 1), other)]


@op(examples=_joined, tolerance=1e-2)
def convolve_add(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, ...], other: Tensor) -> Tensor:
    """A convolution of x, plus `other`."""
    return _convolved(x, weight, bias, padding).add_(other)


def behind(layer: Any, gamma: Tensor, x: Tensor, cache: Any, other: Tensor | None) -> Tensor:
    """The causal convolution `layer` of `norm_silu`."""
    # Not layer(...): its callers would hold what the norm made, a ninth of all that is alive, until it is through.
    joined = with_past(norm_silu(x, gamma), None if cache is None else cache.get(layer), layer.context)
    return cast("Tensor", layer.through(joined, cache, other))


def with_past(x: Tensor, past: Tensor | None, frames: int) -> Tensor:
    """x [B, C, T, H, W] with `frames` frames in front: `past`, or zeros at the beginning of a stream."""
    return F.pad(x, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat((past, x), dim=2)


def frames_like(x: Tensor, frames: int) -> Tensor:
    """So many frames of x's kind, not filled, with the channels last where x has them last."""
    layout = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    size = *x.shape[:2], frames, *x.shape[3:]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def written_behind(layer: Any, gamma: Tensor, x: Tensor, cache: Any, other: Tensor | None) -> Tensor:
    """`behind`, where the norm writes into the tensor that the convolution reads, behind the frames of the past.

    Nothing is copied but those; `behind` copies what the norm made, too, unless it is compiled: compilers write what
    is concatenated where it goes, and take no tensor to write into.
    """
    if torch.compiler.is_compiling():
        return behind(layer, gamma, x, cache, other)
    past, joined = None if cache is None else cache.get(layer), frames_like(x, layer.context + x.shape[2])
    first = joined[:, :, : layer.context]
    first.zero_() if past is None else first.copy_(past)
    norm_silu(x, gamma, out=joined[:, :, layer.context :])
    return cast("Tensor", layer.through(joined, cache, other))


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer for images applied to every frame of [B, C, T, H, W]."""
    batch, channels, frames, height, width = x.shape
    y = layer(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return y.view(batch, frames, *y.shape[1:]).transpose(1, 2)


def resample(layer: Any, x: Tensor) -> Tensor:
    """Every frame of x as the layer changes its size."""
    return per_frame(layer.resample, x)


def shrink_unpadded(layer: Any, x: Tensor) -> Tensor:
    """`resample` where that pads on the right and below and convolves with stride 2: padded by the convolution, on all
    sides and so wide that all its places but the first are those wanted. The result is a view."""
    weight, bias = layer.resample[1].weight, layer.resample[1].bias
    return per_frame(lambda frames: F.conv2d(frames, weight, bias, stride=2, padding=2), x)[..., 1:, 1:]


def enlarge_at_once(layer: Any, x: Tensor) -> Tensor:
    """`resample` where that doubles every pixel and convolves, as one transposed convolution with a
    `doubling_weight`: the doubled pixels are never there."""
    bias = layer.resample[1].bias
    return per_frame(lambda frames: F.conv_transpose2d(frames, layer.doubling, bias, stride=2, padding=1), x)


def doubling_weight(weight: Tensor) -> Tensor:
    """[C, D, 4, 4]: the transposed convolution of stride 2 and padding 1 that does what doubling every pixel of C
    channels and a 3x3 convolution with `weight` [D, C, 3, 3] do, with 4/9 of the products.

    Of three taps that meet doubled pixels two meet the same one: they are added, in float32, once.
    """
    taps = F.pad(weight.float().flip(2, 3), (1, 1, 1, 1))
    taps = taps[:, :, 1:] + taps[:, :, :-1]
    return (taps[..., 1:] + taps[..., :-1]).transpose(0, 1).to(weight.dtype)


def attend_places(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of attention over the places of each frame: [B, L, C]."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_places` as two matrix products round a softmax, for heads too wide for fused kernels.

    Scores are kept in the dtype of q; their number is bounded by taking some queries of one frame at a time.
    """
    out, rows = torch.empty_like(v), max(1, SCORES // k.shape[1])
    for frame, keys in enumerate(k):
        for at in runs(q.shape[1], rows):
            unused = q.new_empty(())
            scores = torch.addmm(unused, q[frame, at], keys.t(), beta=0, alpha=q.shape[-1] ** -0.5)
            out[frame, at] = scores.softmax(dim=-1) @ v[frame]
    return out
