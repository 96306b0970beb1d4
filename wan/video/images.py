"""Frames as images: the only frame of a one-frame video, or a folder of all of them when no video can be written."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.video.files import IMAGES, FileSink, Output, check_names, free_bytes, is_full, reason_of

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

_ELSEWHERE = "choose another --save_file"


class ImageSink(FileSink):
    """Writes the only frame as an image, rounded to the nearest level as upstream's image writer does.

    `output.metadata` goes into .png files; the other formats carry none.
    """

    def __init__(self, output: Output) -> None:
        super().__init__(output.path)
        self.output = output
        self._pixels: Tensor | None = None

    def write(self, frames: Tensor) -> None:
        scaled = (frames.float().clamp(-1, 1) + 1) / 2 * 255
        self.write_pixels((scaled + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0))

    def write_pixels(self, pixels: Tensor) -> None:
        if self.frames + len(pixels) != 1:
            raise self.fail(f"an image holds one frame and {self.frames + len(pixels)} came")
        self._pixels = pixels[0].cpu().contiguous()
        self.frames = 1

    def restart(self) -> None:
        self._pixels = None
        super().restart()

    def finish(self) -> None:
        from PIL import Image

        if self._pixels is None:
            raise self.fail("no frame was decoded")
        form = IMAGES[self.path.suffix.lower()]
        text: dict[str, Any] = {"pnginfo": _text_chunks(self.output.metadata)} if form == "PNG" else {}
        try:
            Image.fromarray(self._pixels.numpy()).save(self.part, format=form, **text)
            with Image.open(self.part) as saved:
                saved.load()
        except OSError as error:
            raise self.fail(reason_of(error), _ELSEWHERE) from error


class PngSink(FileSink):
    """Writes the frames as `folder`/000001.png, 000002.png ...: what is left when no video can be encoded.

    Pixels are those a video would be made of. The folder is called `folder`.part until it is complete and was read
    back; one that exists already stays, and the new one gets a number, so ask for `folder` after `close`.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(Path(folder))
        check_names(metadata or {})
        self.metadata = metadata or {}

    @property
    def folder(self) -> Path:
        """Where the frames are."""
        return self.path

    def write_pixels(self, pixels: Tensor) -> None:
        from PIL import Image

        text = _text_chunks(self.metadata)
        try:
            if not self.frames:
                self._remove()
                self.part.mkdir(parents=True)
            for frame in pixels.cpu().contiguous().numpy():
                if is_full(free_bytes(self.part)):
                    raise self.fail(f"at frame {self.frames + 1}")
                # Level 1 is four times as fast as the default and a tenth larger.
                Image.fromarray(frame).save(self._name(self.frames), format="PNG", compress_level=1, pnginfo=text)
                self.frames += 1
        except OSError as error:
            raise self.fail(f"frame {self.frames + 1}: {reason_of(error)}", _ELSEWHERE) from error

    def restart(self) -> None:
        self.frames = 0
        self._remove()

    def finish(self) -> None:
        from PIL import Image

        if not self.frames:
            raise self.fail("no frame was decoded")
        for index in range(self.frames):
            try:
                with Image.open(self._name(index)) as saved:
                    saved.verify()
            except (OSError, SyntaxError) as error:  # SyntaxError is Pillow's word for a damaged PNG
                raise self.fail(f"frame {index + 1} cannot be read back ({error})", _ELSEWHERE) from error

    def close(self) -> None:
        self.finish()
        wanted = self.path
        for number in itertools.count(2):
            if not os.path.lexists(self.path):
                break
            self.path = wanted.with_name(f"{wanted.name}_{number}")
        self.rename()

    def _name(self, index: int) -> Path:
        return self.part / f"{index + 1:06d}.png"

    def _remove(self) -> None:
        shutil.rmtree(self.part, ignore_errors=True)


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a .png, {} for other images. Raises BadRequest."""
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile

    try:
        with Image.open(path) as image:
            return (
                {str(name): str(text) for name, text in image.text.items()} if isinstance(image, PngImageFile) else {}
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{str(path)!r} cannot be read as an image ({error}); name another file") from error


def _text_chunks(metadata: Mapping[str, str]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in metadata.items():
        chunks.add_itxt(name, text.replace("\0", ""))
    return chunks
