"""Other ways to compute the layers of the VAE: the same formulas with less work and fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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


class _AtSeams(Optimization):
    """Base of those that put something else at seams of the VAE's layers."""

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 2e-2
    seams: ClassVar[Mapping[str, Callable[[Any], Callable[..., Any]]]]
    """Seam -> what makes, for a layer that has it, what stands there."""

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name != "vae":
            return
        for layer in module.modules():
            for seam in self.seams.keys() & vars(layer).keys():
                setattr(layer, seam, self.seams[seam](layer))


def _doubling(layer: Any) -> Callable[..., Any]:
    layer.register_buffer("doubling", doubling_weight(layer.resample[1].weight), persistent=False)
    return enlarge_at_once


@dataclass(frozen=True, kw_only=True)
class VAEChannelsLast(_AtSeams):
    """Keep the VAE's activations with the channels last, as tensor cores and oneDNN read them, and let a norm write its
    result into the tensor that the next convolution reads: no copy, concatenation or padding of activations.

    Convolutions may sum in another order: relative distance at most 1e-5 in float32; in half precision they are as far
    from float32 as the plain ones.
    """

    cost = "nothing"
    seams = {"behind": lambda layer: written_behind, "shrink": lambda layer: shrink_unpadded}
    vae_channels_last: bool = option(False, "the VAE's activations with channels last, written where they are read")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name == "vae":
            convert_conv3d_weight_memory_format(module, torch.channels_last_3d)
        super().finish(module, name, engine)


@dataclass(frozen=True, kw_only=True)
class VAESubpixel(_AtSeams):
    """Where the VAE doubles every pixel and convolves, do both in one transposed convolution: 4/9 of the products, and
    the doubled frames, the largest tensors of a level, are never made.

    Taps that meet copies of one pixel are added when the VAE is loaded, in float32, and rounded once; the added weights
    are kept beside the file's and take 2 % (VAE 2.1) or 5 % (VAE 2.2) of the VAE's bytes more. Distances are
    those of `vae_channels_last`. Source: Shi et al. 2016, arXiv:1609.07009.
    """

    cost = "2 % (VAE 2.1) or 5 % (VAE 2.2) of the VAE's bytes"
    seams = {"enlarge": _doubling}
    vae_subpixel: bool = option(False, "enlarge the VAE's frames in one transposed convolution")


@dataclass(frozen=True, kw_only=True)
class VAEMatmulAttention(_AtSeams):
    """Compute the VAE's attention, whose one head of 384 (VAE 2.1) or 1024 (VAE 2.2) channels is too wide for fused
    kernels, as two matrix products round a softmax.

    Scores are kept for one frame at a time at most, in the VAE's dtype: in half precision they are rounded, which
    doubles the attention's error.
    """

    cost = "the scores of one frame, in memory"
    seams = {"attend": lambda layer: attend_by_products}
    vae_matmul_attention: bool = option(False, "the VAE's attention as plain matrix products")
