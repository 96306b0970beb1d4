"""What Animate is conditioned on: the videos and the picture that Wan's preprocessing lays in a folder, clip by clip.

Letters: H/W height/width of the video, K frames of a clip, T latent frames, h/w latent height/width, z latent channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.conditioning.geometry import multiples, nearest_size
from wan.conditioning.image import known_mask, load_image, pixels_of
from wan.conditioning.video import CHUNK, Source, fit, open_video, read_frames
from wan.engine.errors import BadRequest
from wan.engine.types import Tiling

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FILES", "Sources", "encode_clip", "faces", "letterboxed", "open_sources", "surroundings", "there_and_back"]

FLAG = "--src_root_path"
FILES = {"pose": "src_pose.mp4", "face": "src_face.mp4", "reference": "src_ref.png"}
REPLACED = {"background": "src_bg.mp4", "mask": "src_mask.mp4"}
"""What is needed besides to put the character into the video."""

LATENT = 8
"""Pixels a side of a latent pixel."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """A skeleton, a face and who shall move so; `background` and `mask` (white: made anew) to do it in a video."""

    pose: Source
    face: Source
    reference: Image
    background: Source | None = None
    mask: Source | None = None

    @property
    def frames(self) -> int:
        return self.pose.frames

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the video."""
        return self.pose.width, self.pose.height


def source_paths(root: str | os.PathLike[str], *, replace: bool) -> dict[str, Path]:
    """Role -> file. Raises BadRequest naming all that `root` lacks."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise BadRequest(f"{FLAG} {os.fspath(root)!r} is no folder; pass the one that Wan's preprocessing made")
    paths = {role: folder / name for role, name in (FILES | (REPLACED if replace else {})).items()}
    if lacking := [path.name for path in paths.values() if not path.is_file()]:
        aim = "to replace a person (--replace_flag), " if replace else ""
        raise BadRequest(
            f"{FLAG} {os.fspath(root)!r} lacks {', '.join(lacking)}; {aim}Wan's preprocessing makes "
            f"{', '.join(path.name for path in paths.values())}"
        )
    return paths


def open_sources(
    root: str | os.PathLike[str],
    *,
    replace: bool,
    face_size: int,
    stride: tuple[int, int, int] = (4, 8, 8),
    patch: tuple[int, int, int] = (1, 2, 2),
) -> Sources:
    """The files of a preprocessed folder, gone through once. Raises BadRequest for one that does not fit the others."""
    paths = source_paths(root, replace=replace)
    reference = load_image(paths.pop("reference"), FLAG)
    videos = {role: open_video(path, FLAG) for role, path in paths.items()}
    pose, face = videos["pose"], videos["face"]
    across, down = multiples(stride, patch)
    if pose.width % across or pose.height % down:
        near = "{}x{}".format(*nearest_size(pose.width, pose.height, stride=stride, patch=patch))
        raise BadRequest(
            f"{_named(pose)} is {pose.width}x{pose.height}: both must be multiples of {across}; the nearest is {near}"
        )
    if (face.width, face.height) != (face_size, face_size):
        raise BadRequest(
            f"{_named(face)} is {face.width}x{face.height}; faces must be {face_size}x{face_size}, as the "
            "preprocessing makes them"
        )
    for role, video in videos.items():
        if video.frames != pose.frames:
            raise BadRequest(
                f"{_named(video)} has {video.frames} frames and {pose.path.name} {pose.frames}: both must come from "
                "one run of the preprocessing"
            )
        if role in REPLACED and (video.width, video.height) != (pose.width, pose.height):
            raise BadRequest(
                f"{_named(video)} is {video.width}x{video.height} and {pose.path.name} {pose.width}x{pose.height}: "
                "both must come from one run of the preprocessing"
            )
    return Sources(reference=reference, **videos)


def there_and_back(count: int, start: int, stop: int) -> list[int]:
    """Numbers of the frames at moments `start` to `stop` of a video of `count` frames that plays there and back."""
    last = max(count - 1, 1)
    return [min(last - abs(moment % (2 * last) - last), count - 1) for moment in range(start, stop)]


def letterboxed(image: Image, width: int, height: int) -> Tensor:
    """[3, height, width] in -1..1: the picture scaled to fit whole (bilinear), centred on black.

    Roundings are upstream's, so that the character stands where the model was trained to see it.
    """
    if image.height / image.width > height / width:
        inner = int(height / image.height * image.width), height
    else:
        inner = width, int(width / image.width * image.height)
    inner = max(inner[0], 1), max(inner[1], 1)
    scaled = F.interpolate(pixels_of(image)[None], size=inner[::-1], mode="bilinear", align_corners=False)[0]
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    return F.pad(scaled, (left, width - inner[0] - left, top, height - inner[1] - top), value=-1.0)


def faces(source: Source, numbers: Sequence[int]) -> Tensor:
    """[1, 3, K, S, S] in -1..1."""
    return fit(_frames(source, numbers), source.height, source.width)[None]


def encode_clip(
    vae: Any,
    source: Source,
    numbers: Sequence[int],
    given: Tensor | None = None,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """[1, z, T, h, w] latents of the frames of those numbers; `given` [3, n, H, W] take the place of the first ones."""
    weight = next(vae.parameters())
    pixels = _frames(source, numbers)

    def chunks() -> Iterator[Tensor]:
        start = 0
        for piece in pixels.split([1, *[CHUNK] * ((len(pixels) - 1) // CHUNK)]):
            frames = fit(piece, source.height, source.width).to(weight)
            if given is not None and start < given.shape[1]:
                own = given[:, start : start + frames.shape[1]].to(weight)
                frames = torch.cat((own, frames[:, own.shape[1] :]), 1)
            yield frames[None]
            start += len(piece)

    blank = weight.new_zeros(1, 3, CHUNK, source.height, source.width)
    return torch.cat(list(vae.encode_stream(chunks(), blank, tiling=tiling)), dim=2)


def surroundings(
    vae: Any, sources: Sources, numbers: Sequence[int], before: Tensor | None, tiling: Tiling | None = None
) -> Tensor:
    """[1, 4 + z, T, h, w]: which pixels of a clip are given (1), and the latents of those that are.

    Given are the frames `before` [3, n, H, W], which the clip begins with, and what of the background the mask leaves.
    """
    first = 0 if before is None else before.shape[1]
    weight = next(vae.parameters())
    if sources.background is None or sources.mask is None:
        blank = weight.new_zeros(1, 3, sources.pose.height, sources.pose.width)
        frames = {n: before[None, :, n].to(weight) for n in range(first)} if before is not None else {0: blank}
        latents: Tensor = vae.encode_sparse(frames, len(numbers), tiling=tiling)
        mask = known_mask(range(first), len(numbers), *latents.shape[3:], rate=CHUNK)
    else:
        latents = encode_clip(vae, sources.background, numbers, before, tiling=tiling)
        mask = _left_by(sources.mask, numbers, first)
    return torch.cat((mask[None].to(latents), latents), dim=1)


def _left_by(mask: Source, numbers: Sequence[int], first: int) -> Tensor:
    """[4, T, h, w]: 1 where a mask is black, and in the `first` frames; each video frame a channel of its latent."""
    # What upstream's nearest-neighbour scaling takes: the top left pixel of each cell.
    cells = _frames(mask, numbers)[:, ::LATENT, ::LATENT, 0].float() / 255
    left = 1 - cells
    left[:first] = 1
    return torch.cat((left[:1].expand(CHUNK, -1, -1), left[1:])).unflatten(0, (-1, CHUNK)).transpose(0, 1)


def _frames(source: Source, numbers: Sequence[int]) -> Tensor:
    """uint8 [K, H, W, 3] of the frames of those numbers, in any order; each is read once."""
    wanted = sorted(set(numbers))
    [pixels] = read_frames(source, [wanted])
    place = {number: index for index, number in enumerate(wanted)}
    return pixels[[place[number] for number in numbers]]


def _named(source: Source) -> str:
    return f"{FLAG}: {str(source.path)!r}"
