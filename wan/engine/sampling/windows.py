"""Long videos through windows of the length a model was trained on: which frames each sees, and how they are joined.

Frames are latent frames. Facts and names of the schedules follow ComfyUI-WanVideoWrapper and AnimateDiff-Evolved.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Window = tuple[int, ...]


def windows(schedule: str, count: int, size: int, overlap: int, step: int) -> list[Window]:
    """The windows of `size` of `count` frames in solver step `step`; together they cover every frame.

    "static" has the same ones in every step, the last one aligned with the end. "uniform" moves them from step to
    step, so that no joint stays where it is; "looped" does that round a video whose end goes on at its beginning.
    """
    if count <= size:
        return [tuple(range(count))]
    stride = size - overlap
    if schedule == "static":
        starts = [*range(0, count - size, stride), count - size]
        return [tuple(range(start, start + size)) for start in starts]
    phase = round(count * halving(step))
    if schedule == "looped":
        return [tuple(frame % count for frame in range(at, at + size)) for at in range(phase, phase + count, stride)]
    starts = [*range(phase % stride, count - size, stride), count - size]
    return [tuple(range(start, start + size)) for start in dict.fromkeys([0, *starts])]


def halving(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: the binary digits of `step` behind the point, the last one first."""
    value, digit = 0.0, 0.5
    while step:
        value += digit * (step & 1)
        step, digit = step >> 1, digit / 2
    return value


def weights(window: Window, count: int, overlap: int, fuse: str) -> list[float]:
    """How much each frame of `window` counts where windows meet; never 0, so that the sum over windows is not.

    "linear" rises over the overlap and falls again, but not at the two ends of the video; "pyramid" rises to the
    middle of the window. A window that goes round the end has both flanks.
    """
    size = len(window)
    rising = window[0] != 0 or window[-1] < window[0]
    falling = window[-1] != count - 1 or window[-1] < window[0]
    ramp = overlap if fuse == "linear" else (size + 1) // 2
    values = []
    for i in range(size):
        left = (i + 1) / (ramp + 1) if rising else 1.0
        right = (size - i) / (ramp + 1) if falling else 1.0
        values.append(min(1.0, left, right))
    return values


def shuffled_noise(noise: Tensor, size: int, overlap: int, seed: int) -> Tensor:
    """`noise` [B, C, T, H, W] whose frames behind the first window are those of the window before, in another order.

    Every window then begins from the same noise, which keeps it to the same motion and picture. Source: FreeNoise,
    arXiv:2310.15169.
    """
    count, stride = noise.shape[2], size - overlap
    order = random.Random(seed)
    noise = noise.clone()
    for start in range(0, count - size, stride):
        frames = list(range(start, start + stride))
        order.shuffle(frames)
        end = min(start + size + stride, count)
        noise[:, :, start + size : end] = noise[:, :, frames[: end - start - size]]
    return noise


def of_window(scenes: Sequence[object], window: Iterable[int], count: int) -> int:
    """Which of several prompts, spread evenly over the video, a window follows: that of its last frame."""
    return min(len(scenes) - 1, int(max(window) * len(scenes) / count))


class Mean:
    """The weighted mean of what windows say about each frame of `like` [B, C, T, H, W]; holds no more than one."""

    def __init__(self, like: Tensor) -> None:
        self._total = torch.zeros_like(like)
        self._weight = torch.zeros(like.shape[2], dtype=like.dtype, device=like.device)

    def add(self, window: Window, values: Tensor, shares: Sequence[float]) -> None:
        """What a window says, [B, C, n, H, W], and how much each of its frames counts."""
        index = torch.tensor(window, device=values.device)
        share = torch.tensor(shares, dtype=self._total.dtype, device=values.device)
        self._total.index_add_(2, index, values * share.view(1, 1, -1, 1, 1))
        self._weight.index_add_(0, index, share)

    def value(self) -> Tensor:
        """The mean; nothing is added afterwards, it is made in place."""
        return self._total.div_(self._weight.view(1, 1, -1, 1, 1))
