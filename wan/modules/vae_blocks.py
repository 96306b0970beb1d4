"""Layers of the two video VAEs, written for a stream of frames: causal convolutions, resamplers, attention, shortcuts.

Every layer that looks back in time takes a `FrameCache`, which belongs to one stream and is passed explicitly. Without
a cache a layer sees a whole clip; with one it sees the next frames of a clip. Both give the same numbers, because what
the first frame does differently is decided by "there is no past yet", never by how many frames arrive together.

Shapes: B batch, C channels, T frames, H height, W width; values [B, C, T, H, W]. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def with_past(x: Tensor, past: Tensor | None, frames: int) -> Tensor:
    """x [B, C, T, H, W] with the last `frames` frames of `past` in front, zeros where there are fewer."""
    if past is None:
        return F.pad(x, (0, 0, 0, 0, frames, 0))
    missing = frames - past.shape[2]
    joined = torch.cat((past, x), dim=2)
    return F.pad(joined, (0, 0, 0, 0, missing, 0)) if missing else joined


def convolve(x: Tensor, layer: nn.Conv3d) -> Tensor:
    """The layer's 3-D convolution of x.

    PyTorch keeps float32 with batch 1 and a small input away from oneDNN (aten/native/Convolution.cpp, `use_mkldnn`);
    the fallback is 3 to 8 times slower and all that a short clip on the CPU would use.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(
            x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
        )
    return F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def last_frames(x: Tensor, frames: int) -> Tensor:
    """A copy of the last frames, so that the cache does not keep the whole chunk alive."""
    return x[:, :, -frames:].clone()


class CausalConv3d(Causal, nn.Conv3d):
    """Conv3d whose time padding lies on the left: frame t sees frames t-2..t (time kernel 3) or t alone (kernel 1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2))
        self.context = kernel - 1

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        if self.context:
            x = with_past(x, None if cache is None else cache.get(self), self.context)
            if cache is not None:
                cache[self] = last_frames(x, self.context)
        return convolve(x, self)


class RMSNorm(nn.Module):
    """Unit RMS over the channels (dim 1), times gamma; `spatial_dims` only sets gamma's trailing ones."""

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        # One sum of squares instead of F.normalize, whose norm over dim 1 is ten times slower on the CPU; the floor
        # is F.normalize's eps 1e-12, squared.
        # In half precision the squares would overflow (from 256 on in float16), so there it is the norm after all.
        if x.dtype in (torch.float16, torch.bfloat16):
            square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square()
        else:
            square = x.square().sum(dim=1, keepdim=True)
        inverse = (square.clamp_min(1e-24) / x.shape[1]).rsqrt().to(x.dtype)
        return (x * inverse).mul_(self.gamma)


class SiLU(nn.Module):
    """x * sigmoid(x); overwrites its input, a fresh result of the norm before it, when no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not x.requires_grad)


class ResidualBlock(Causal):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = Chain(
            RMSNorm(in_channels),
            SiLU(),
            CausalConv3d(in_channels, out_channels, 3),
            RMSNorm(out_channels),
            SiLU(),
            nn.Identity(),  # upstream's dropout, rate 0: keeps the index of the next layer
            CausalConv3d(out_channels, out_channels, 3),
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        return self.residual(x, cache).add_(self.shortcut(x))


class AttentionBlock(nn.Module):
    """One-head self-attention over the positions of each frame, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, spatial_dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        flat = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        qkv = self.to_qkv(self.norm(flat)).flatten(2).transpose(1, 2)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        out = self.proj(out.reshape(batch * frames, channels, height, width))
        return x + out.view(batch, frames, channels, height, width).transpose(1, 2)


class Downsample(Causal):
    """Halves height and width; with `temporal` also the frames after the first: 1 + 2n -> 1 + n."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = last_frames(x, 1)
        if past is not None:
            return convolve(torch.cat((past, x), dim=2), self.time_conv)
        if x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], convolve(x, self.time_conv)), dim=2)


class Upsample(Causal):
    """Doubles height and width; with `temporal` also the frames after the first: 1 + n -> 1 + 2n."""

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self.double_frames(self.time_conv, x, cache)
        return per_frame(self.resample, x)

    def double_frames(self, time_conv: nn.Conv3d, x: Tensor, cache: FrameCache | None) -> Tensor:
        """Two frames for each but the stream's first, which stays single and is nobody's context (as upstream)."""
        past = None if cache is None else cache.get(self)
        first, rest = (x[:, :, :1], x[:, :, 1:]) if past is None else (x[:, :, :0], x)
        if cache is not None:
            seen = rest if past is None else torch.cat((past, rest), dim=2)
            cache[self] = last_frames(seen, 2)
        if rest.shape[2] == 0:
            return first
        pair = convolve(with_past(rest, past, 2), time_conv)
        batch, channels, frames, height, width = rest.shape
        pair = pair.view(batch, 2, channels, frames, height, width).permute(0, 2, 3, 1, 4, 5)
        doubled = pair.reshape(batch, channels, 2 * frames, height, width)
        return torch.cat((first, doubled), dim=2) if past is None else doubled


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for images applied to every frame of [B, C, T, H, W]."""
    batch, channels, frames, height, width = x.shape
    y = layer(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return y.view(batch, frames, *y.shape[1:]).transpose(1, 2)


class DownGroup(Causal):
    """A level of the 2.2 encoder: residual blocks, down-sampling, and a shortcut around them without parameters."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, down: bool, temporal: bool) -> None:
        super().__init__()
        layers = residual_blocks(in_channels, out_channels, blocks)
        if down:
            layers.append(Downsample(out_channels, temporal))
        self.downsamples = Chain(*layers)
        self.out_channels = out_channels
        self.factors = (2 if temporal else 1, 2 if down else 1)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        time, space = self.factors
        padded = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
        folded = fold(padded, time, space).flatten(1, 4)
        shortcut = folded.unflatten(1, (self.out_channels, -1)).mean(dim=2)
        return self.downsamples(x, cache) + shortcut


class UpGroup(Causal):
    """A level of the 2.2 decoder: residual blocks, up-sampling, and (but for the last level) a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, up: bool, temporal: bool) -> None:
        super().__init__()
        layers = residual_blocks(in_channels, out_channels, blocks)
        if up:
            layers.append(Upsample(out_channels, out_channels, temporal))
        self.upsamples = Chain(*layers)
        self.out_channels = out_channels
        self.factors = (2 if temporal else 1, 2) if up else None

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        if self.factors is None:
            return self.upsamples(x, cache)
        is_first = cache is None or self not in cache
        if cache is not None:
            cache[self] = x.new_empty(0)  # only marks that the stream has begun
        time, space = self.factors
        repeats = self.out_channels * time * space * space // x.shape[1]
        folded = x.repeat_interleave(repeats, dim=1).unflatten(1, (self.out_channels, time, space, space))
        shortcut = unfold(folded)[:, :, time - 1 if is_first else 0 :]
        return self.upsamples(x, cache) + shortcut


def fold(x: Tensor, time: int, space: int) -> Tensor:
    """[B, C, T*t, H*r, W*c] -> [B, C, t, r, c, T, H, W]: blocks of pixels become channels."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6)


def unfold(x: Tensor) -> Tensor:
    """[B, C, t, r, c, T, H, W] -> [B, C, T*t, H*r, W*c], the inverse of `fold`."""
    batch, channels, time, rows, columns, frames, height, width = x.shape
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, channels, frames * time, height * rows, width * columns)


def middle(channels: int) -> Chain:
    """The bottleneck: residual block, attention, residual block."""
    return Chain(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head(channels: int, out_channels: int) -> Chain:
    """The last layers of an encoder or decoder."""
    return Chain(RMSNorm(channels), SiLU(), CausalConv3d(channels, out_channels, 3))


def pairs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(in, out) channels of consecutive layers."""
    return list(zip(widths, widths[1:], strict=False))


def residual_blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """`count` residual blocks, the first of which changes the channels."""
    return [ResidualBlock(a, b) for a, b in pairs([in_channels] + [out_channels] * count)]
