"""The colours of a video that is made clip by clip: told for each, and, where it is asked for, kept to the first's.

Every clip begins with frames that were decoded and encoded again, so small shifts of brightness and colour add up. What
each clip has is measured on a part of its pixels. Matching goes by the first clip, as matching to the clip before would
follow the drift; the first clip itself is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from wan.video.files import to_pixels

if TYPE_CHECKING:
    from wan.engine.types import Denoising, Keeper

EVERY = 4
"""Of this many frames, rows and columns one is measured."""
GAIN = 2.0
"""Contrast is changed by at most this factor: a nearly even picture has no contrast to go by."""


class Writer(Protocol):
    """What takes the frames: a file's sink."""

    def write(self, frames: Tensor) -> None: ...

    def write_pixels(self, pixels: Tensor) -> None: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Moments:
    """Mean and deviation of red, green and blue in 8-bit levels, of the pixels so far."""

    frames: int = 0
    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add(self, pixels: Tensor) -> None:
        """uint8 [n, H, W, 3]."""
        first = -self.frames % EVERY
        seen = pixels[first::EVERY, ::EVERY, ::EVERY].reshape(-1, 3).double()
        self.frames += len(pixels)
        self.count += len(seen)
        self.sums += seen.sum(0)
        self.squares += seen.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sums / max(self.count, 1)

    @property
    def deviation(self) -> Tensor:
        return (self.squares / max(self.count, 1) - self.mean.square()).clamp_min(0).sqrt()


class ClipColors:
    """A sink before another one that knows where clips begin. `match`: a later clip is held until it is complete, as
    8-bit frames, and written with the mean and the contrast of the first."""

    def __init__(self, sink: Writer, *, match: bool = False) -> None:
        self._sink, self._match = sink, match
        self.clips: list[Moments] = []
        self._held: list[Tensor] = []

    def begin(self, clip: int) -> None:
        """Frames of this clip come next."""
        if clip >= len(self.clips):
            self.flush()
            self.clips.append(Moments())

    def write(self, frames: Tensor) -> None:
        """Frames [3, n, H, W] in -1..1."""
        if not self.clips:
            self.begin(0)
        pixels = to_pixels(frames).cpu()
        self.clips[-1].add(pixels)
        if self._match and len(self.clips) > 1:
            self._held.append(pixels)
        else:
            self._sink.write(frames)

    def flush(self) -> None:
        """Write what is held."""
        held, self._held = self._held, []
        for pixels in held:
            self._sink.write_pixels(matched(pixels, self.clips[-1], self.clips[0]))

    def restart(self) -> None:
        self._held = []
        self.clips = []
        self._sink.restart()

    def close(self) -> None:
        self.flush()
        self._sink.close()

    def told(self) -> list[dict[str, Any]]:
        """For the record: where each clip begins, and its colours as they were made."""
        found, start = [], 0
        for moments in self.clips:
            found.append(
                {
                    "first_frame": start,
                    "frames": moments.frames,
                    "mean_rgb": [round(float(value), 3) for value in moments.mean],
                    "deviation_rgb": [round(float(value), 3) for value in moments.deviation],
                    "matched": self._match and start > 0,
                }
            )
            start += moments.frames
        return found

    def marking(self, keeper: Keeper) -> Keeper:
        """`keeper`, which is asked before each clip whether it has it, and so marks where one begins."""
        return _Marking(keeper, self)


def matched(pixels: Tensor, own: Moments, first: Moments) -> Tensor:
    """uint8 frames [n, H, W, 3] of a clip with colours `own`, with those of `first`."""
    gain = (first.deviation / own.deviation.clamp_min(1e-6)).clamp(1 / GAIN, GAIN)
    table = torch.arange(256, dtype=torch.float64)[:, None]  # 256 levels of three channels are all there is
    levels = ((table - own.mean) * gain + first.mean).round().clamp(0, 255).to(torch.uint8)
    return torch.stack([levels[:, channel][pixels[..., channel].long()] for channel in range(3)], dim=-1)


class _Marking:
    """A `Keeper` before another one."""

    def __init__(self, keeper: Keeper, colors: ClipColors) -> None:
        self._keeper, self._colors = keeper, colors

    def finished(self, shot: int) -> Tensor | None:
        self._colors.begin(shot)
        return self._keeper.finished(shot)

    def restore(self, run: Denoising) -> None:
        self._keeper.restore(run)

    def stepped(self, run: Denoising, resumable: bool) -> None:
        self._keeper.stepped(run, resumable)

    def denoised(self, run: Denoising) -> None:
        self._keeper.denoised(run)
