"""What changes the size of frames in the two video VAEs, and VAE 2.2's levels, which have a shortcut around each.

Only here does the first frame of a stream differ from others: it stays single in time. Shapes and names as in
`vae_blocks`.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.video import convolve, resample, with_past
from wan.modules.vae_blocks import Causal, Chain, FrameCache, last_frames, residual_blocks


class Downsample(Causal):
    """Halves height and width; with `temporal` also the frames after the first: 1 + 2n -> 1 + n.

    `shrink` is a seam: `(layer, frames) -> frames`, convolved and half as high and wide.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        self.shrink = resample

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        x = self.shrink(self, x)
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
    """Doubles height and width; with `temporal` also the frames after the first: 1 + n -> 1 + 2n.

    `enlarge` is a seam: `(layer, frames) -> frames`, twice as high and wide, and convolved.
    """

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None
        self.enlarge = resample

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self.double_frames(self.time_conv, x, cache)
        return self.enlarge(self, x)

    def double_frames(self, time_conv: nn.Conv3d, x: Tensor, cache: FrameCache | None) -> Tensor:
        """Two frames for each but the stream's first, which stays single and is nobody's context (as upstream)."""
        past = None if cache is None else cache.get(self)
        first, rest = (x[:, :, :1], x[:, :, 1:]) if past is None else (x[:, :, :0], x)
        joined = with_past(rest, past, 2)
        if cache is not None:
            cache[self] = last_frames(joined, 2)
        if rest.shape[2] == 0:
            return first
        pair = convolve(joined, time_conv).unflatten(1, (2, -1))
        doubled = pair.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat((first, doubled), dim=2) if past is None else doubled


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
        shortcut = self.shortcut(x)
        return self.downsamples(x, cache) + shortcut

    def shortcut(self, x: Tensor) -> Tensor:
        """x as the level leaves it, by means alone: places become channels, neighbouring channels one."""
        time, space = self.factors
        missing = -x.shape[2] % time
        folded = fold(F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x, time, space).flatten(1, 4)
        return folded.unflatten(1, (self.out_channels, -1)).mean(dim=2)


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
        y = self.upsamples(x, cache)
        add_enlarged(y, x, self.factors[0], is_first)
        return y


def add_enlarged(y: Tensor, x: Tensor, time: int, is_first: bool) -> None:
    """Add to y every value of x `time` times in time and four times in space, spread over neighbours and channels.

    Neighbours in time and space, in this order, of one channel of y, are what that many values of y's channels
    would be if each channel of x were repeated until there are enough. Of a stream's first frame only the last is made.
    """
    skipped = time - 1 if is_first else 0
    spread = x.shape[1] // y.shape[1]
    for number, (t, row, column) in enumerate(product(range(time), range(2), range(2))):
        first = (t - skipped) % time
        source = x[:, number * spread // (4 * time) :: spread, (first + skipped) // time :]
        y[:, :, first::time, row::2, column::2].add_(source)


def fold(x: Tensor, time: int, space: int) -> Tensor:
    """[B, C, T*t, H*r, W*c] -> [B, C, t, r, c, T, H, W]: blocks of pixels become channels."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6)


def unfold(x: Tensor) -> Tensor:
    """[B, C, t, r, c, T, H, W] -> [B, C, T*t, H*r, W*c], the inverse of `fold`."""
    batch, channels, time, rows, columns, frames, height, width = x.shape
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, channels, frames * time, height * rows, width * columns)
