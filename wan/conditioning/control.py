"""What VACE is conditioned on: a control video cut by a mask into what stays and what is made anew, and references.

Video and mask are gone through once, a few frames at a time, both parts encoded side by side: whatever the length, no
more pixels are held than the VAE takes at once.

Letters: T/H/W frames/height/width of the video, t/h/w of the latents, z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat, tee
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.conditioning.video import CHUNK, Clip
from wan.engine.errors import BadRequest
from wan.engine.types import Tiling

__all__ = ["MASK_CELL", "check_control", "control_latents", "mask_channels", "nearest_frames", "on_canvas", "shape_of"]

MASK_CELL = 8
"""The mask is not encoded: each cell of this many pixels a side becomes as many channels of one latent pixel."""

Video = Tensor | Clip
"""[C, T, H, W]: values at hand, or frames still to be read."""


def control_latents(
    vae: Any,
    frames: Video | None,
    mask: Video | None,
    refs: Sequence[Tensor],
    shape: tuple[int, int, int],
    tiling: Tiling | None = None,
) -> Tensor:
    """[1, 2z + 64, len(refs) + t, h, w]: latents of what stays, of what is made anew, and the mask.

    `shape` is (T, H, W) of the video; `frames` None is a grey one, `mask` None makes everything anew. Where the mask
    [1 or 3, T, H, W] is above 0.5, `frames` in -1..1 only guide. `refs` [3, 1, H, W] come first in time.
    """
    check_control(frames, mask, refs, shape)
    weight = next(vae.parameters())
    picks = nearest_frames(shape[0], (shape[0] + 3) // CHUNK)
    masks: list[Tensor] = []

    def parts() -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """What stays and what is made anew of each piece [1, 3, 1 or 4, H, W]; None, but for the first, for grey."""
        start = 0
        for picture, cut in zip(_pieces(frames, 3, 0.0, shape), _pieces(mask, 1, 1.0, shape), strict=True):
            picture, cut = picture.to(weight), cut.to(weight)
            masks.extend(cut[0, number - start] for number in picks if start <= number < start + cut.shape[1])
            inside = (cut > 0.5).to(weight)
            halves = (picture * (1 - inside))[None], (picture * inside)[None]
            yield tuple(half if not start or half.any() else None for half in halves)  # type: ignore[misc]
            start += cut.shape[1]

    left, right = tee(parts())
    grey = weight.new_zeros(1, 3, CHUNK, *shape[1:])
    stays = vae.encode_stream((part[0] for part in left), grey, tiling=tiling)
    anew = vae.encode_stream((part[1] for part in right), grey, tiling=tiling)
    latents = torch.cat([torch.cat(pair, dim=1).float() for pair in zip(stays, anew, strict=True)], dim=2)
    control = torch.cat((latents, mask_channels(torch.stack(masks))[None].float()), dim=1)
    return torch.cat((*(_reference(vae, ref, control.shape[1], tiling) for ref in refs), control), dim=2)


def mask_channels(mask: Tensor) -> Tensor:
    """[64, t, H / 8, W / 8] of a mask [t, H, W]: the cell's rows and columns as channels, row by row."""
    t, height, width = mask.shape
    cells = mask.view(t, height // MASK_CELL, MASK_CELL, width // MASK_CELL, MASK_CELL)
    return cells.permute(2, 4, 0, 1, 3).flatten(0, 1)


def nearest_frames(available: int, count: int) -> list[int]:
    """The frame that each of `count` latent frames takes its mask from ("nearest-exact" interpolation)."""
    numbers = torch.arange(available, dtype=torch.float32)[None, None]
    return [int(number) for number in F.interpolate(numbers, size=count, mode="nearest-exact")[0, 0]]


def on_canvas(image: Tensor, height: int, width: int) -> Tensor:
    """A picture [3, 1, h, w] in -1..1 at the size: scaled to fit whole, centred on white."""
    rows, columns = image.shape[2:]
    if (rows, columns) == (height, width):
        return image
    scale = min(height / rows, width / columns)
    inner = max(int(rows * scale), 1), max(int(columns * scale), 1)
    fitted = F.interpolate(image.transpose(0, 1), size=inner, mode="bilinear", align_corners=False).transpose(0, 1)
    canvas = image.new_ones(3, 1, height, width)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas[:, :, top : top + inner[0], left : left + inner[1]] = fitted
    return canvas


def check_control(
    frames: Video | None, mask: Video | None, refs: Sequence[Tensor], shape: tuple[int, int, int]
) -> None:
    """Raise BadRequest unless video, mask and references are all of the video's (T, H, W)."""
    named = [("video", frames, (3,), shape), ("mask", mask, (1, 3), shape)]
    named += [(f"reference image {i}", ref, (3,), (1, *shape[1:])) for i, ref in enumerate(refs, 1)]
    for name, given, channels, expected in named:
        if given is not None and (tuple(given.shape[1:]) != expected or given.shape[0] not in channels):
            count = " or ".join(map(str, channels))
            raise BadRequest(
                f"the {name} is {list(given.shape)}; it must be [{count}, {expected[0]}, {expected[1]}, {expected[2]}] "
                "(channels, frames, height, width) like the rest"
            )


def shape_of(frames: Video) -> tuple[int, int, int]:
    """(T, H, W)."""
    _, count, height, width = frames.shape
    return count, height, width


def _pieces(video: Video | None, channels: int, fill: float, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """A video as one frame, then four at a time; None is one of the value `fill`."""
    if isinstance(video, Clip):
        return video.chunks()
    count, height, width = shape
    lengths = [1, *repeat(CHUNK, (count - 1) // CHUNK)]
    if video is None:
        return (torch.full((channels, length, height, width), fill) for length in lengths)
    return iter(video.split(lengths, dim=1))


def _reference(vae: Any, image: Tensor, channels: int, tiling: Tiling | None) -> Tensor:
    """[1, C, 1, h, w]: one latent frame that stays, without a mask."""
    latents = vae.encode(image[None].to(next(vae.parameters())), tiling=tiling).float()
    return F.pad(latents, (0, 0, 0, 0, 0, 0, 0, channels - latents.shape[1]))
