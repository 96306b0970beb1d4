"""What is to be written, and what all writers share: a file that has its name only once it is complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from wan.engine.errors import BadRequest, OutputError

MUXERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

RESERVE_BYTES = 2 << 20
"""With less than this free a disk is called full: encoders hold frames back and would find it out at the end."""

# What the systems say of a full disk, a full quota, and Windows of either.
_FULL_WORDS = ("no space left", "quota exceeded", "not enough space")


@dataclass(frozen=True, kw_only=True)
class Soundtrack:
    """What is heard: the sound of `path` from `start` seconds on, and silence from where it ends up to `seconds`."""

    path: Path
    seconds: float
    start: float = 0.0


@dataclass(frozen=True)
class Output:
    """The file to write and how: nothing here changes a pixel before encoding.

    `path` ends in .mp4, .mov or .mkv, or for a single frame in .png, .jpg or .webp. `fps` is the playback rate,
    `crf` libx264's constant quality (0 lossless .. 51; 10 is upstream's). `metadata` is text by name ("title",
    "comment" or any other in small letters), put into videos and .png files; what no format can hold (NUL) is left
    out. `sound` goes into videos alone. Raises BadRequest.
    """

    path: Path
    fps: float = 16
    crf: int = 10
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    sound: Soundtrack | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        suffix = self.path.suffix.lower()
        if suffix not in MUXERS and suffix not in IMAGES:
            raise BadRequest(
                f"cannot write {str(self.path)!r}: name a file that ends in {', '.join((*MUXERS, *IMAGES))}."
            )
        if not 0 < self.fps <= 1000:
            raise BadRequest(f"fps={self.fps!r} is not a frame rate; use more than 0 and at most 1000, 16 is usual.")
        if self.crf not in range(52):
            raise BadRequest(f"crf={self.crf!r} is not a quality; use 0 (lossless) to 51, 10 is the default.")
        check_names(self.metadata)

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGES


def check_names(metadata: Mapping[str, str]) -> None:
    """Raise BadRequest for a name that would not come back from every format as it was."""
    for name in metadata:
        if not re.fullmatch("[a-z][a-z0-9_]{0,40}", name):
            raise BadRequest(f"metadata[{name!r}]: use a name of small letters, digits and underscores.")


def to_pixels(frames: Tensor) -> Tensor:
    """Frames [3, n, H, W] in -1..1 as uint8 [n, H, W, 3]: clamped, then truncated, as upstream's writer does."""
    scaled = (frames.float().clamp(-1, 1) + 1) / 2 * 255
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


class TensorSink:
    """Keeps the frames for callers of the API; `result` is [3, N, H, W] in -1..1, dtype and device as written."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def write(self, frames: Tensor) -> None:
        self._chunks.append(frames)

    def restart(self) -> None:
        self._chunks.clear()

    def close(self) -> None:
        """Nothing to finish."""

    @property
    def result(self) -> Tensor:
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks, dim=1)]
        return self._chunks[0]


class FileSink:
    """What writers of files share: `name.part` until complete, and no remains after a failure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.frames = 0
        """Frames written so far."""

    def write(self, frames: Tensor) -> None:
        """Append frames [3, n, H, W] in -1..1."""
        self.write_pixels(to_pixels(frames))

    def write_pixels(self, pixels: Tensor) -> None:
        """Append uint8 frames [n, H, W, 3]. Raises OutputError."""
        raise NotImplementedError

    def restart(self) -> None:
        """Forget everything written and remove the unfinished file: decoding begins anew, or has failed."""
        self.frames = 0
        self.part.unlink(missing_ok=True)

    def finish(self) -> None:
        """Complete the `.part` file and read it back. Raises OutputError, leaving no file."""
        raise NotImplementedError

    def close(self) -> None:
        """Complete the file and give it its name. Raises OutputError."""
        self.finish()
        self.rename()

    def rename(self) -> None:
        """Give what is complete its name. Raises OutputError."""
        try:
            os.replace(self.part, self.path)
        except OSError as error:
            raise OutputError(
                f"cannot rename {str(self.part)!r} to {self.path.name!r}: {reason_of(error)}; the finished video stays "
                "under the first name: close the program that holds the file and rename it"
            ) from error

    def fail(self, reason: str, remedy: str = "") -> OutputError:
        """The error to raise, after nothing is left: it reads on, as the caller adds what was kept."""
        reason = explained(reason, remedy, self.path.parent)
        self.restart()
        return OutputError(f"could not write {str(self.path)!r}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.restart()


def explained(reason: str, remedy: str, folder: Path) -> str:
    """`reason` with `remedy`; where the disk of `folder` is full that is the reason, with what is free."""
    free = free_bytes(folder)
    if is_full(free) or any(words in reason.lower() for words in _FULL_WORDS):
        left = "" if free is None else f", {free / 2**20:.1f} MiB are free in {str(folder)!r}"
        return f"the disk is full ({reason}{left}); make room or choose another --save_file"
    return f"{reason}; {remedy}" if remedy else reason


def free_bytes(folder: Path) -> int | None:
    """What is free where `folder` lies; None where that cannot be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def is_full(free: int | None) -> bool:
    """True when so little is free that the next frames may not fit."""
    return free is not None and free < RESERVE_BYTES


def reason_of(error: OSError) -> str:
    return error.strerror or str(error)
