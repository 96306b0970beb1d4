"""Other ways to compute the layers of the VAE: the same formulas with less work and fewer passes over memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import convert_conv3d_weight_memory_format

from wan.engine.ops.video import (
    attend_by_products,
    doubling_weight,
    enlarge_at_once,
    shrink_unpadded,
    written_behind,
)
from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class VAEChannelsLast(Optimization):
    """Keep the VAE's activations with the channels last, as tensor cores and oneDNN read them, and let a norm write its
    result into the tensor that the next convolution reads: no copy, concatenation or padding of activations.

    Convolutions may sum in another order: relative distance at most 1e-5 in float32; in half precision they are as far
    from float32 as the plain ones.
    """

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 2e-2
    vae_channels_last: bool = option(False, "the VAE's activations with channels last, written where they are read")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name == "vae":
            convert_conv3d_weight_memory_format(module, torch.channels_last_3d)
            for layer in _with_seam(module, "behind"):
                layer.behind = written_behind
            for layer in _with_seam(module, "shrink"):
                layer.shrink = shrink_unpadded


@dataclass(frozen=True, kw_only=True)
class VAESubpixel(Optimization):
    """Where the VAE doubles every pixel and convolves, do both in one transposed convolution: 4/9 of the products, and
    the doubled frames, the largest tensors of a level, are never made.

    Taps that meet copies of one pixel are added when the VAE is loaded, in float32, and rounded once; the added weights
    are kept beside the file's and take 2 % (VAE 2.1) or 5 % (VAE 2.2) of the VAE's bytes more. Distances are
    those of `vae_channels_last`. Source: Shi et al. 2016, arXiv:1609.07009.
    """

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 2e-2
    vae_subpixel: bool = option(False, "enlarge the VAE's frames in one transposed convolution")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name == "vae":
            for layer in _with_seam(module, "enlarge"):
                layer.register_buffer("doubling", doubling_weight(layer.resample[1].weight), persistent=False)
                layer.enlarge = enlarge_at_once


@dataclass(frozen=True, kw_only=True)
class VAEMatmulAttention(Optimization):
    """Compute the VAE's attention, whose one head of 384 (VAE 2.1) or 1024 (VAE 2.2) channels is too wide for fused
    kernels, as two matrix products round a softmax.

    Scores are kept for one frame at a time at most, in the VAE's dtype: in half precision they are rounded, which
    doubles the attention's error.
    """

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 2e-2
    vae_matmul_attention: bool = option(False, "the VAE's attention as plain matrix products")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name == "vae":
            for layer in _with_seam(module, "attend"):
                layer.attend = attend_by_products


def _with_seam(module: nn.Module, seam: str) -> Iterator[Any]:
    return (layer for layer in module.modules() if seam in vars(layer))
