"""Which frame sizes and frame counts a model can make, and the nearest ones it can: pure arithmetic, no torch.

The VAE divides time and space by its stride, the transformer's patches divide the latents again, and neither pads.
So width and height are multiples of stride x patch (16; 32 with VAE 2.2) and frames are 4n+1: the first frame is
encoded alone, every further latent frame holds four.
"""

from __future__ import annotations

import math
import re

from wan.engine.errors import BadRequest

NAMED_SIZES = {"720p": (1280, 720), "480p": (832, 480)}
"""Name -> (width, height), landscape. Portrait is spelled out: 720x1280."""

_SIZE = re.compile(r"\s*(\d{1,6})\s*[*x×X]\s*(\d{1,6})\s*")


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from `1280*720`, `1280x720`, `720p` or `480p`. Raises BadRequest for anything else."""
    named = NAMED_SIZES.get(text.strip().lower())
    if named is not None:
        return named
    match = _SIZE.fullmatch(text)
    if match is None:
        names = ", ".join(NAMED_SIZES)
        raise BadRequest(f"size {text!r} is not WIDTH*HEIGHT: write 1280*720 or 1280x720, or one of {names}")
    return int(match[1]), int(match[2])


def multiples(stride: tuple[int, int, int] = (4, 8, 8), patch: tuple[int, int, int] = (1, 2, 2)) -> tuple[int, int]:
    """What (width, height) must be multiples of."""
    return stride[2] * patch[2], stride[1] * patch[1]


def nearest_size(
    width: int, height: int, *, stride: tuple[int, int, int] = (4, 8, 8), patch: tuple[int, int, int] = (1, 2, 2)
) -> tuple[int, int]:
    """The legal (width, height) closest to the given one; at least one patch each way."""
    across, down = multiples(stride, patch)
    return _nearest_multiple(width, across), _nearest_multiple(height, down)


def nearest_frames(num_frames: float, *, stride: int = 4) -> int:
    """The legal frame count closest to `num_frames`, the longer of two equally close; at least 1."""
    return max(0, int((num_frames - 1) / stride + 0.5)) * stride + 1


def frames_for(seconds: float, fps: float, *, stride: int = 4) -> int:
    """The legal frame count whose duration at `fps` is closest to `seconds`: 5 s at 16 fps are 81 frames."""
    return nearest_frames(seconds * fps, stride=stride)


def check_video(
    height: int,
    width: int,
    num_frames: int,
    *,
    stride: tuple[int, int, int] = (4, 8, 8),
    patch: tuple[int, int, int] = (1, 2, 2),
) -> None:
    """Raise BadRequest, naming the nearest legal values, unless a model of this stride and patch makes the video."""
    across, down = multiples(stride, patch)
    if width < across or height < down or width % across or height % down:
        near = "{}x{}".format(*nearest_size(width, height, stride=stride, patch=patch))
        rule = f"multiples of {across}" if across == down else f"multiples of {across} and {down}"
        raise BadRequest(f"size {width}x{height}: width and height must be {rule}; the nearest is {near}")
    check_frames(num_frames, stride=stride[0])


def check_frames(num_frames: int, *, stride: int = 4) -> None:
    """Raise BadRequest, naming both neighbours, unless `num_frames` is 1 + a multiple of `stride`."""
    if num_frames < 1:
        raise BadRequest(f"{num_frames} frames: the count must be {stride}n+1 (1, {stride + 1}, ...); the nearest is 1")
    over = (num_frames - 1) % stride
    if over:
        below = num_frames - over
        near = f"the nearest are {below} and {below + stride}"
        raise BadRequest(f"{num_frames} frames: the count must be {stride}n+1; {near}")


def best_output_size(w: int, h: int, dw: int, dh: int, expected_area: int) -> tuple[int, int]:
    """The (width, height) nearest in shape to w x h with sides divisible by dw and dh and at most `expected_area`."""
    ratio = w / h
    width = math.sqrt(expected_area * ratio)
    height = expected_area / width
    # One side is rounded down to its grid, the other takes what area is left; either may come closer to the shape.
    first_width = int(width // dw * dw)
    first_height = int(expected_area / first_width // dh * dh) if first_width else 0
    second_height = int(height // dh * dh)
    second_width = int(expected_area / second_height // dw * dw) if second_height else 0
    candidates = [(second_width, second_height), (first_width, first_height)]
    candidates = [(width, height) for width, height in candidates if width and height]
    if not candidates:
        raise BadRequest(f"no {dw}x{dh} grid fits a {w}x{h} picture into {expected_area!r} pixels; allow more pixels.")
    return min(candidates, key=lambda size: max(ratio * size[1] / size[0], size[0] / size[1] / ratio))


def _nearest_multiple(value: int, of: int) -> int:
    """Of two equally close the smaller: 720 becomes 704 where 32 divides, the size such models were trained on."""
    return max(of, math.ceil(value / of - 0.5) * of)
