"""Encoding a video that is blank but for a few frames, without computing the same blank chunk again and again.

A causal layer forgets: once all the frames it remembers are blank, further blank frames give what the last ones gave.
So in a run of blank chunks the first stages settle after a few, later ones after more, and of every chunk only the
stages that have not settled are computed. The result is the same to the bit, as the same numbers meet the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from wan.modules.vae_blocks import Causal, CausalConv3d, Chain, FrameCache, ResidualBlock
from wan.modules.vae_resample import DownGroup, Downsample

Stage = nn.Module | Callable[[Tensor], Tensor]


class ChunkEncoder:
    """All `stages` for each of consecutive chunks [B, C, T, H, W] of one video; None stands for `blank`."""

    def __init__(self, stages: Sequence[Stage], blank: Tensor) -> None:
        self.stages, self.blank = stages, blank
        self.cache = FrameCache()
        self.settled = _settled(stages, blank.shape[2])
        self.blanks, self.kept = 0, blank

    def __call__(self, chunk: Tensor | None) -> Tensor:
        if chunk is not None:
            self.blanks, self.kept = 0, self.blank
            return through(self.stages, chunk, self.cache)
        start, end = _depth(self.settled, self.blanks - 1), _depth(self.settled, self.blanks)
        self.kept = through(self.stages[start:end], self.kept, self.cache)
        self.blanks += 1
        return through(self.stages[end:], self.kept, self.cache)

    def move(self, device: torch.device | str) -> None:
        """Keep what is remembered there: parked in RAM while other streams compute."""
        self.cache.move(device)
        self.kept = self.kept.to(device)


def through(stages: Sequence[Stage], x: Tensor, cache: FrameCache) -> Tensor:
    """The output of all `stages` for the next chunk of a stream."""
    for stage in stages:
        x = stage(x, cache) if isinstance(stage, (Causal, Chain)) else stage(x)
    return x


def _depth(settled: Sequence[int], blanks: int) -> int:
    """How many of the first stages give for the blank chunk of this number what they give for all that follow."""
    return sum(each <= blanks for each in settled)


def _settled(stages: Sequence[Stage], frames: int) -> list[int]:
    """Number of the blank chunk from which on each stage's output stays the same."""
    delays = []
    for stage in stages:
        delay, frames = _delay(stage, frames)
        delays.append(delay)
    return list(accumulate(delays))


def _delay(layer: Stage, frames: int) -> tuple[int, int]:
    """How many equal chunks of `frames` a layer must see before its output stays the same, and the frames it makes."""
    if isinstance(layer, CausalConv3d):
        return -(-layer.context // frames), frames
    if isinstance(layer, Downsample):
        return (0, frames) if layer.time_conv is None else (1, frames // 2)
    if isinstance(layer, ResidualBlock):
        return _delay(layer.residual, frames)
    if isinstance(layer, DownGroup):
        return _delay(layer.downsamples, frames)
    if not isinstance(layer, Chain):
        return 0, frames
    total = 0
    for each in layer:
        delay, frames = _delay(each, frames)
        total += delay
    return total, frames
