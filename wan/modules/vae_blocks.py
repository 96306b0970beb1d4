"""Layers of the two video VAEs, written for a stream of frames: causal convolutions, norm, attention.

Every layer that looks back in time takes a `FrameCache`, which belongs to one stream and is passed explicitly. Without
a cache a layer sees a whole clip; with one it sees the next frames of a clip. Both give the same numbers, because what
the first frame does differently is decided by "there is no past yet", never by how many frames arrive together.

Shapes: B batch, C channels, T frames, H height, W width; values [B, C, T, H, W]. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from wan.engine.ops.video import (
    Behind,
    attend_places,
    behind,
    convolve,
    convolve_add,
    frames_like,
    rms_norm,
    with_past,
)


class FrameCache(dict[nn.Module, Tensor]):
    """The last frames seen by each causal layer of one stream; a new stream starts with an empty one."""

    def move(self, device: torch.device | str) -> None:
        """Keep the frames there: parked in RAM while other streams compute."""
        self.update({layer: frames.to(device) for layer, frames in self.items()})


class Causal(nn.Module):
    """A layer whose output depends on earlier frames: its forward takes the stream's cache."""

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        raise NotImplementedError


class Chain(nn.Sequential):
    """A sequence of layers that hands the cache to those that need it."""

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        for layer in self:
            x = layer(x, cache) if isinstance(layer, (Causal, Chain)) else layer(x)
        return x


class Activated(Chain):
    """Causal convolutions, each behind a norm and SiLU; what else is in the chain only keeps upstream's indices."""

    def forward(self, x: Tensor, cache: FrameCache | None = None, other: Tensor | None = None) -> Tensor:
        """`other` is added to what the last convolution makes."""
        norms = [layer for layer in self if isinstance(layer, RMSNorm)]
        *convolutions, last = [layer for layer in self if isinstance(layer, CausalConv3d)]
        for norm, convolution in zip(norms, convolutions, strict=False):
            x = convolution.behind(convolution, norm.gamma, x, cache, None)
        return last.behind(last, norms[-1].gamma, x, cache, other)


def last_frames(x: Tensor, frames: int) -> Tensor:
    """A copy of the last frames, so that the cache does not keep the whole chunk alive.

    Laid out alike whatever chunk they are from: what a compiler makes of one chunk then serves all.
    """
    return frames_like(x, frames).copy_(x[:, :, -frames:])


class CausalConv3d(Causal, nn.Conv3d):
    """Conv3d whose time padding lies on the left: frame t sees frames t-2..t (time kernel 3) or t alone (kernel 1).

    `behind` is a seam: the convolution behind SiLU and a norm with this gamma.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2))
        self.context = kernel - 1
        self.behind: Behind = behind

    def forward(self, x: Tensor, cache: FrameCache | None = None, other: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `other` if there is one."""
        if not self.context:
            return convolve(x, self)
        return self.through(with_past(x, None if cache is None else cache.get(self), self.context), cache, other)

    def through(self, joined: Tensor, cache: FrameCache | None, other: Tensor | None) -> Tensor:
        """The convolution of frames that have their past in front."""
        if cache is not None:
            cache[self] = last_frames(joined, self.context)
        if other is None:
            return convolve(joined, self)
        assert self.bias is not None
        return convolve_add(joined, self.weight, self.bias, cast("tuple[int, ...]", self.padding), other)


class RMSNorm(nn.Module):
    """Unit RMS over the channels (dim 1), times gamma; `spatial_dims` only sets gamma's trailing ones."""

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


class ResidualBlock(Causal):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = Activated(
            RMSNorm(in_channels),
            nn.Identity(),  # SiLU
            CausalConv3d(in_channels, out_channels, 3),
            RMSNorm(out_channels),
            nn.Identity(),  # SiLU
            nn.Identity(),  # upstream's dropout, rate 0
            CausalConv3d(out_channels, out_channels, 3),
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        return self.residual(x, cache, self.shortcut(x))


class AttentionBlock(nn.Module):
    """One-head self-attention over the places of each frame, with a residual; `attend` is a seam."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, spatial_dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.attend = attend_places

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        flat = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        qkv = self.to_qkv(self.norm(flat)).flatten(2).transpose(1, 2)
        out = self.attend(*qkv.chunk(3, dim=-1)).transpose(1, 2)
        out = self.proj(out.reshape(batch * frames, channels, height, width))
        return x + out.view(batch, frames, channels, height, width).transpose(1, 2)


def middle(channels: int) -> Chain:
    """The bottleneck: residual block, attention, residual block."""
    return Chain(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head(channels: int, out_channels: int) -> Chain:
    """The last layers of an encoder or decoder."""
    return Activated(RMSNorm(channels), nn.Identity(), CausalConv3d(channels, out_channels, 3))


def pairs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(in, out) channels of consecutive layers."""
    return list(zip(widths, widths[1:], strict=False))


def residual_blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """`count` residual blocks, the first of which changes the channels."""
    return [ResidualBlock(a, b) for a, b in pairs([in_channels] + [out_channels] * count)]
