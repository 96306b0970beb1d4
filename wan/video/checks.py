"""The writer that fits an output, and the trial that finds out before hours of work what would stop it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from wan.engine.errors import BadRequest, OutputError
from wan.video.encoder import VideoSink
from wan.video.ffmpeg import ffmpeg_exe, read_tags
from wan.video.files import IMAGES, Output, reason_of
from wan.video.images import ImageSink, read_text


def open_sink(output: Output) -> VideoSink | ImageSink:
    """The writer for `output`; nothing is opened before the first frame comes."""
    return ImageSink(output) if output.is_image else VideoSink(output)


def test_encode(output: Output, *, height: int = 64, width: int = 64, num_frames: int = 2) -> None:
    """Try the output before hours of work: folder, free disk, and a two-frame encode read back.

    Makes the folder if needed and leaves no file. Raises BadRequest (several frames into an image), MissingPackage
    (no ffmpeg) or OutputError.
    """
    if output.is_image and num_frames != 1:
        raise BadRequest(f"{str(output.path)!r} is an image and {num_frames!r} frames are asked for; use a .mp4 name.")
    folder = output.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"cannot write into {str(folder)!r}: {reason_of(error)}; choose another --save_file"
        ) from error
    if output.path.is_dir():
        raise OutputError(f"{str(output.path)!r} is a folder; give --save_file a file name")
    # Half a byte a pixel is noise at crf 10; real videos need a tenth of it.
    needed = (num_frames * height * width // 2) + (4 << 20)
    if free < needed:
        raise OutputError(
            f"{str(folder)!r} has {free / 2**20:.0f} MiB free and the video may need {needed / 2**20:.0f} MiB; "
            "make room or choose another --save_file"
        )
    if not output.is_image:
        ffmpeg_exe()
    sink = open_sink(output)
    try:
        sink.write(torch.zeros(3, 1 if output.is_image else 2, height, width))
        sink.finish()
    finally:
        sink.restart()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text a video or .png carries, by name; other images carry none: {}. Raises BadRequest."""
    return read_text(Path(path)) if Path(path).suffix.lower() in IMAGES else read_tags(path)
