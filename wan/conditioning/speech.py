"""What a speaking video is made from beside its sound: who speaks, at which size, and the pose to take.

The arithmetic of sizes and moments is upstream's (`wan/speech2video.py`).

Letters: H/W height/width of the video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.conditioning.image import pixels_of
from wan.conditioning.video import Source, fit, read_frames
from wan.engine.errors import BadRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GRID", "PoseVideo", "reference_pixels", "speech_size"]

GRID = 64
"""What both sides are multiples of: the largest patch of what came before is 64 pixels wide."""

BLANK = -1.0
"""Pixels where a pose video has ended."""


def speech_size(width: int, height: int, max_area: int) -> tuple[int, int]:
    """The (width, height) for a picture of that size: as large as `max_area` and the picture allow, in about its shape.

    Of 100 scales from the largest down the first whose sides, rounded up to the grid, fit. Raises BadRequest.
    """
    area = width * height
    low, high = 0.1, 1.0
    if area > max_area:
        # Upstream's bound (its root takes 2ac for 4ac): another one would make other steps, and so other sizes.
        high, edge = math.sqrt(max_area / area), GRID - 1
        b, c = edge * (height + width), edge**2 - max_area
        low = (math.sqrt(b * b - 2 * area * c) - b) / (2 * area)
    for step in range(100):
        scale = high - (high - low) * step / 100
        across, down = (math.ceil(int(side * scale) / GRID) * GRID for side in (width, height))
        if 0 < across * down <= max_area:
            return across, down
    raise BadRequest(
        f"a picture of {width}x{height} pixels fits no video of {max_area} pixels with sides that are multiples of "
        f"{GRID}: cut it, or choose a larger --size"
    )


def reference_pixels(image: Image, width: int, height: int) -> Tensor:
    """float32 [3, 1, height, width] in -1..1: the picture scaled to cover the size (bilinear), cut at the centre."""
    from PIL.Image import Resampling

    scale = max(width / image.width, height / image.height)
    size = max(int(image.width * scale), width), max(int(image.height * scale), height)
    scaled = image.resize(size, Resampling.BILINEAR)
    left, top = round((scaled.width - width) / 2), round((scaled.height - height) / 2)
    return pixels_of(scaled.crop((left, top, left + width, top + height)))[:, None]


@dataclass(frozen=True, kw_only=True)
class PoseVideo:
    """A video of poses, read clip by clip at the frame rate of what is made."""

    source: Source
    fps: float

    def clip(self, first: int, count: int, height: int, width: int) -> Tensor:
        """float32 [3, count, height, width] in -1..1 of the frames from number `first` on; blank beyond the end."""
        numbers = [round(frame / self.fps * self.source.fps) for frame in range(first, first + count)]
        there = [number for number in numbers if number < self.source.frames]
        rest = torch.full((3, count - len(there), height, width), BLANK)
        pieces: Iterator[Tensor] = read_frames(self.source, [(number,) for number in there])
        return torch.cat([*(fit(piece, height, width) for piece in pieces), rest], dim=1)
