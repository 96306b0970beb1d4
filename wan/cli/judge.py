"""Reads, from pixels alone, what a clip of the demo's world shows.

The demo model (`demo/`) draws one coloured shape that moves over a grey backdrop. Because that world is small, whether
a generated clip obeys its prompt can be measured instead of judged by eye, and every approximation (a cache, a
low-precision format, a sparse attention) can be held against the same ruler. The world's vocabulary lives here, next
to the code that reads it; the renderer that makes training clips imports it.

All objects are saturated and all backdrops are grey, so a pixel minus its own grey value is `coverage * object chroma`:
the object's soft outline can be read exactly, whatever the backdrop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.errors import BadRequest

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (235, 220, 30),
    "green": (30, 170, 50),
    "cyan": (30, 200, 220),
    "blue": (40, 70, 225),
    "purple": (140, 40, 200),
    "pink": (250, 120, 190),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {  # unit steps in pixels, x to the right and y down
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}
MOTIONS = (*DIRECTIONS, "still", "grow", "shrink")
SIZES = ("small", "large")
SPEEDS = ("slow", "quick")
TONES: dict[str, tuple[int, int]] = {"black": (18, 62), "gray": (105, 150), "white": (240, 196)}  # base, pattern
TEXTURES = ("plain", "striped", "checkered", "dotted")

CLIP_FRAMES = 33  # a clip's length; distances below are pixels per clip of that length at 96 x 96
STILL_BELOW = 7.0  # trained clips travel at least 14 px
QUICK_FROM = 28.5  # slow clips travel 14 to 19 px, quick ones 38 to 46
LARGE_FROM = 17.0  # half extent in px: small is 12 to 14, large 20 to 22
RESIZED_FROM = 0.47  # |log area ratio|: growing and shrinking clips change by at least 0.94
PATTERN_FROM = 0.5  # a texture is there if its contrast is at least this share of the trained one


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a clip shows. `size` and `speed` are None where the motion makes the word meaningless."""

    color: str
    shape: str
    motion: str
    size: str | None
    speed: str | None
    tone: str
    texture: str
    shape_iou: float  # mean overlap with the best template, 0..1
    color_distance: float  # RGB distance (0..441) of the object's interior to the nearest palette colour
    outline_iou: float | None  # mean overlap of successive re-centred outlines; None while the size changes

    def agrees(self, **wanted: str | None) -> dict[str, bool]:
        """Compares attribute by attribute; wanted values that are None are left out."""
        return {name: getattr(self, name) == value for name, value in wanted.items() if value is not None}


def texture_pattern(name: str, height: int, width: int) -> Tensor:
    """Returns the pattern [height, width] of a backdrop: 0 where its base tone shows, 1 where its second tone does."""
    y = torch.arange(height).view(-1, 1).expand(height, width)
    x = torch.arange(width).view(1, -1).expand(height, width)
    if name == "plain":
        return torch.zeros(height, width)
    if name == "striped":
        return (x // 8 % 2).float()
    if name == "checkered":
        return ((x // 8 + y // 8) % 2).float()
    if name == "dotted":
        distance = ((x % 16 - 7.5) ** 2 + (y % 16 - 7.5) ** 2).sqrt()
        return (5.0 - distance).clamp(0, 1)
    raise BadRequest(f"no texture is called {name!r}; use one of {', '.join(TEXTURES)}")


def shape_template(name: str, size: int = 48) -> Tensor:
    """Returns the coverage [size, size] of a shape that fills its bounding box."""
    axis = (torch.arange(size * 4) + 0.5) / (size * 2) - 1.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if name == "circle":
        inside = x**2 + y**2 <= 1
    elif name == "square":
        inside = torch.ones_like(x, dtype=torch.bool)
    elif name == "triangle":
        inside = x.abs() <= (y + 1) / 2
    else:
        raise BadRequest(f"no shape is called {name!r}; use one of {', '.join(SHAPES)}")
    return F.avg_pool2d(inside.float()[None, None], 4)[0, 0]


def judge(video: Tensor) -> Verdict:
    """Reads a clip [3, T, H, W] with values in [-1, 1], T >= 2, trained size 33 x 96 x 96.

    Raises BadRequest on another layout. A clip without any coloured object still gets a verdict, of low `shape_iou`.
    """
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[1] < 2:
        raise BadRequest(f"no video of shape {tuple(video.shape)!r} can be judged; pass [3, T, H, W] with T >= 2")
    frames = (video.float().clamp(-1, 1).movedim(0, 1) + 1) * 127.5  # [T, 3, H, W], 0..255
    color, distance, chroma = _object_color(frames)
    coverage = _coverage(frames, chroma)
    mask = _largest_blob(coverage)
    soft = coverage * _dilate(mask, 2)
    motion, travel = _motion(soft)
    shape, shape_iou = _shape(soft, mask)
    tone, texture = _backdrop(frames, mask)
    resized = motion in ("grow", "shrink")
    return Verdict(
        color=color,
        shape=shape,
        motion=motion,
        size=None if resized else SIZES[_half_extent(mask) >= LARGE_FROM],
        speed=SPEEDS[travel >= QUICK_FROM] if motion in DIRECTIONS else None,
        tone=tone,
        texture=texture,
        shape_iou=shape_iou,
        color_distance=distance,
        outline_iou=None if resized else _outline_iou(soft),
    )


def _chroma(frames: Tensor) -> Tensor:
    return frames - frames.mean(1, keepdim=True)


def _object_color(frames: Tensor) -> tuple[str, float, Tensor]:
    """Nearest palette colour, distance to it, and the object's mean chroma [3]."""
    strength = _chroma(frames).square().sum(1).sqrt()
    threshold = 0.6 * strength.flatten(1).topk(40).values.mean()
    core = strength >= threshold
    eroded = 1 - _dilate((~core).float(), 1)
    picked = eroded.bool() if eroded.sum() >= 20 * len(frames) else core
    interior = frames.movedim(1, -1)[picked].median(0).values
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    distances = (palette - interior).square().sum(1).sqrt()
    best = int(distances.argmin())
    return list(COLORS)[best], float(distances[best]), interior - interior.mean()


def _coverage(frames: Tensor, chroma: Tensor) -> Tensor:
    """Share of each pixel that the object covers, [T, H, W] in 0..1."""
    projected = torch.einsum("tchw,c->thw", _chroma(frames), chroma)
    return (projected / chroma.square().sum().clamp_min(1e-6)).clamp(0, 1)


def _dilate(mask: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(mask[:, None], 2 * radius + 1, 1, radius)[:, 0]


def _largest_blob(coverage: Tensor) -> Tensor:
    """The connected region (of coverage >= 0.5) around the densest spot of every frame, [T, H, W] of 0 and 1."""
    solid = (coverage >= 0.5).float()
    density = F.avg_pool2d(coverage[:, None], 9, 1, 4)[:, 0] * solid
    peak = density.flatten(1).argmax(1)
    grown = torch.zeros_like(solid).flatten(1).scatter_(1, peak[:, None], 1.0).view_as(solid) * solid
    while True:
        wider = _dilate(grown, 1) * solid
        if torch.equal(wider, grown):
            return grown
        grown = wider


def _centroids(soft: Tensor) -> Tensor:
    """[T, 2] as (x, y)."""
    mass = soft.sum((1, 2)).clamp_min(1e-6)
    x = (soft.sum(1) * torch.arange(soft.shape[2])).sum(1) / mass
    y = (soft.sum(2) * torch.arange(soft.shape[1])).sum(1) / mass
    return torch.stack([x, y], 1)


def _motion(soft: Tensor) -> tuple[str, float]:
    """The motion and the distance travelled in pixels per 33-frame clip."""
    area = soft.sum((1, 2)).clamp_min(1.0)
    ends = max(1, len(area) // 8)
    growth = float((area[-ends:].mean() / area[:ends].mean()).log())
    if abs(growth) >= RESIZED_FROM:
        return ("grow" if growth > 0 else "shrink"), 0.0
    time = torch.arange(len(soft), dtype=torch.float32)
    time = time - time.mean()
    slope = (time[:, None] * _centroids(soft)).sum(0) / time.square().sum()
    dx, dy = (slope * (CLIP_FRAMES - 1)).tolist()
    travel = math.hypot(dx, dy)
    if travel < STILL_BELOW:
        return "still", travel
    sector = round(math.atan2(dy, dx) / (math.pi / 4)) % 8
    return list(DIRECTIONS)[sector], travel


def _boxes(mask: Tensor) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of every non-empty frame."""
    boxes = []
    for frame in mask:
        rows, columns = frame.any(1).nonzero().flatten(), frame.any(0).nonzero().flatten()
        if len(rows):
            boxes.append((int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1))
        else:
            boxes.append((0, 0, 0, 0))
    return boxes


def _half_extent(mask: Tensor) -> float:
    extents = [(bottom - top + right - left) / 4 for top, bottom, left, right in _boxes(mask)]
    return sum(extents) / len(extents)


def _shape(soft: Tensor, mask: Tensor) -> tuple[str, float]:
    templates = torch.stack([shape_template(name) for name in SHAPES])
    scores = torch.zeros(len(SHAPES))
    for frame, (top, bottom, left, right) in zip(soft, _boxes(mask), strict=True):
        if bottom - top < 3 or right - left < 3:
            continue
        crop = frame[top:bottom, left:right][None, None]
        fitted = F.interpolate(crop, templates.shape[1:], mode="bilinear", align_corners=False)[0]
        scores += torch.minimum(fitted, templates).sum((1, 2)) / torch.maximum(fitted, templates).sum((1, 2))
    best = int(scores.argmax())
    return SHAPES[best], float(scores[best]) / len(soft)


def _backdrop(frames: Tensor, mask: Tensor) -> tuple[str, str]:
    """Tone and texture of what is left when the object and a margin around it are taken away."""
    free = 1 - _dilate(mask, 4)
    seen = free.sum(0)
    gray = (frames.mean(1) * free).sum(0) / seen.clamp_min(1)
    valid = seen >= 1
    height, width = gray.shape
    values = gray[valid] - gray[valid].mean()
    scores = {}
    for name in TEXTURES[1:]:
        pattern = texture_pattern(name, height, width)[valid]
        pattern = pattern - pattern.mean()
        scores[name] = float((values * pattern).sum() / pattern.square().sum())  # contrast in gray levels
    texture = max(scores, key=lambda name: abs(scores[name]))
    if abs(scores[texture]) < PATTERN_FROM * 44:
        texture = "plain"
    shown = texture_pattern(texture, height, width)[valid].mean()
    levels = {name: base + (second - base) * float(shown) for name, (base, second) in TONES.items()}
    tone = min(levels, key=lambda name: abs(levels[name] - float(gray[valid].mean())))
    return tone, texture


def _outline_iou(soft: Tensor) -> float:
    """Mean soft overlap of each frame with the next one shifted (by fractions of a pixel) onto its centroid."""
    here, after = soft[:-1, None], soft[1:, None]
    height, width = soft.shape[1:]
    shift = _centroids(soft)[1:] - _centroids(soft)[:-1]  # [T - 1, 2]
    theta = torch.zeros(len(here), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, :, 2] = shift * torch.tensor([2 / width, 2 / height])
    grid = F.affine_grid(theta, list(here.shape), align_corners=False)
    moved = F.grid_sample(after, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    overlap = torch.minimum(here, moved).sum((1, 2, 3)) / torch.maximum(here, moved).sum((1, 2, 3)).clamp_min(1e-6)
    return float(overlap.mean())
