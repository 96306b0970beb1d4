"""Where finished frames go: a video file, an image, or a tensor; and the checks that keep a result from being lost.

Frames stream into ffmpeg as they are decoded, so memory does not grow with length. A file appears under its name only
when it is complete and was read back. Whatever can go wrong with the output is tried by `test_encode` before any
weight is read.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest, MissingPackage, OutputError

__all__ = [
    "ImageSink",
    "Output",
    "TensorSink",
    "VideoInfo",
    "VideoSink",
    "default_file_name",
    "open_sink",
    "safe_name",
    "test_encode",
    "to_pixels",
    "verify_video",
]

_MUXERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
_IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
_WINDOWS_DEVICES |= {f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"}

# RGB is full range; H.264 players expect limited-range BT.709, and must be told so or they guess by size.
# "area" averages 2x2 chroma exactly (bicubic overshoots at edges, by up to 4 levels), the other flags round correctly.
_TO_BT709 = (
    "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=area+accurate_rnd+full_chroma_int+full_chroma_inp,"
    "format=yuv420p,setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
)
_BT709_TAGS = ["-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709", "-color_range", "tv"]


@dataclass(frozen=True)
class Output:
    """The file to write and how: nothing here changes a pixel before encoding.

    `path` ends in .mp4, .mov or .mkv, or for a single frame in .png, .jpg or .webp. `fps` is the playback rate,
    `crf` libx264's constant quality (0 lossless .. 51; 10 is upstream's). Raises BadRequest.
    """

    path: Path
    fps: float = 16
    crf: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        suffix = self.path.suffix.lower()
        if suffix not in _MUXERS and suffix not in _IMAGES:
            raise BadRequest(
                f"cannot write {str(self.path)!r}: name a file that ends in {', '.join((*_MUXERS, *_IMAGES))}."
            )
        if not 0 < self.fps <= 1000:
            raise BadRequest(f"fps={self.fps!r} is not a frame rate; use more than 0 and at most 1000, 16 is usual.")
        if self.crf not in range(52):
            raise BadRequest(f"crf={self.crf!r} is not a quality; use 0 (lossless) to 51, 10 is the default.")

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in _IMAGES


class VideoInfo(NamedTuple):
    """What `verify_video` found in a file."""

    frames: int
    width: int
    height: int
    fps: float


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


class _FileSink:
    """What writers of files share: `name.part` until complete, and no remains after a failure."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.path = output.path
        self.part = output.path.with_name(output.path.name + ".part")
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
        try:
            os.replace(self.part, self.path)
        except OSError as error:
            raise OutputError(
                f"cannot rename {str(self.part)!r} to {self.path.name!r}: {_reason(error)}; the finished video stays "
                "under the first name: close the program that holds the file and rename it."
            ) from error

    def fail(self, reason: str) -> OutputError:
        self.restart()
        return OutputError(
            f"could not write {str(self.path)!r}: {reason}. Choose another --save_file or make room, and run again."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.restart()


class VideoSink(_FileSink):
    """Streams frames into ffmpeg: H.264, yuv420p, tagged BT.709, index at the front.

    All frames have one size; an odd side gets its last row or column twice, because yuv420p stores colour per 2x2.
    """

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._size = (0, 0)

    def write_pixels(self, pixels: Tensor) -> None:
        height, width = pixels.shape[1:3]
        if height % 2 or width % 2:
            pixels = _repeat_last(pixels)
            height, width = pixels.shape[1:3]
        if self._ffmpeg is None:
            self._start(height, width)
        if (height, width) != self._size:
            raise self.fail(f"a frame of {width}x{height} came after frames of {self._size[1]}x{self._size[0]}")
        try:
            self._ffmpeg.stdin.write(memoryview(pixels.cpu().contiguous().numpy()).cast("B"))
        except OSError as error:
            raise self.fail(self._ending() or _reason(error)) from error
        self.frames += len(pixels)

    def restart(self) -> None:
        if self._ffmpeg is not None:
            self._ffmpeg.kill()
            self._ending()
        super().restart()

    def finish(self) -> None:
        if self._ffmpeg is None:
            raise self.fail("no frame was decoded")
        ffmpeg = self._ffmpeg
        words = self._ending()
        if ffmpeg.returncode:
            raise self.fail(words or f"ffmpeg ended with status {ffmpeg.returncode}")
        try:
            found = verify_video(self.part)
        except OutputError as error:
            raise self.fail(f"the file was written, but {error}") from error
        if (found.frames, found.height, found.width) != (self.frames, *self._size):
            wrote = f"{self.frames} frames of {self._size[1]}x{self._size[0]}"
            raise self.fail(f"the file holds {found.frames} frames of {found.width}x{found.height} instead of {wrote}")

    def _start(self, height: int, width: int) -> None:
        muxer = _MUXERS[self.path.suffix.lower()]
        command = [_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        command += ["-framerate", f"{self.output.fps:g}", "-i", "pipe:0", "-an", "-vf", _TO_BT709]
        command += ["-c:v", "libx264", "-crf", str(self.output.crf), *_BT709_TAGS]
        command += [] if muxer == "matroska" else ["-movflags", "+faststart"]
        command += ["-f", muxer, f"file:{self.part}"]
        # A file, not a pipe: nobody reads while frames are written, and a full pipe would block ffmpeg.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _ending)
        # Its own session, so that Ctrl-C reaches the program alone, which then removes the part.
        try:
            self._ffmpeg = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, start_new_session=True
            )
        except OSError as error:
            self._log.close()
            raise self.fail(f"{command[0]!r} does not start ({_reason(error)})") from error
        self._size = (height, width)

    def _ending(self) -> str:
        """Close ffmpeg's input, wait for it, and return its last words."""
        assert self._ffmpeg is not None and self._log is not None
        with contextlib.suppress(OSError):  # it may have ended already; its words say why
            self._ffmpeg.stdin.close()
        self._ffmpeg.wait()
        self._ffmpeg = None
        self._log.seek(0)
        words = _last_words(self._log.read())
        self._log.close()
        return words


class ImageSink(_FileSink):
    """Writes the only frame as an image, rounded to the nearest level as upstream's image writer does."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._pixels: Tensor | None = None

    def write(self, frames: Tensor) -> None:
        scaled = (frames.float().clamp(-1, 1) + 1) / 2 * 255
        self.write_pixels((scaled + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0))

    def write_pixels(self, pixels: Tensor) -> None:
        if self.frames + len(pixels) != 1:
            raise self.fail(f"an image holds one frame and {self.frames + len(pixels)} came")
        self._pixels = pixels[0].cpu().contiguous()
        self.frames = 1

    def finish(self) -> None:
        from PIL import Image

        if self._pixels is None:
            raise self.fail("no frame was decoded")
        try:
            image = Image.fromarray(self._pixels.numpy())
            image.save(self.part, format=_IMAGES[self.path.suffix.lower()])
            with Image.open(self.part) as saved:
                saved.load()
        except OSError as error:
            raise self.fail(_reason(error)) from error


def open_sink(output: Output) -> VideoSink | ImageSink:
    """The writer for `output`; nothing is opened before the first frame comes."""
    return ImageSink(output) if output.is_image else VideoSink(output)


def test_encode(output: Output, *, height: int = 64, width: int = 64, num_frames: int = 2) -> None:
    """Try the output before hours of work: folder, free disk, and a two-frame encode read back.

    Makes the folder if needed and leaves no file. Raises BadRequest (several frames into an image) or OutputError.
    """
    if output.is_image and num_frames != 1:
        raise BadRequest(f"{str(output.path)!r} is an image and {num_frames!r} frames are asked for; use a .mp4 name.")
    folder = output.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"cannot write into {str(folder)!r}: {_reason(error)}; choose another --save_file."
        ) from error
    if output.path.is_dir():
        raise OutputError(f"{str(output.path)!r} is a folder; give --save_file a file name.")
    # Half a byte a pixel is noise at crf 10; real videos need a tenth of it.
    needed = (num_frames * height * width // 2) + (4 << 20)
    if free < needed:
        raise OutputError(
            f"{str(folder)!r} has {free / 2**20:.0f} MiB free and the video may need {needed / 2**20:.0f} MiB; "
            "make room or choose another --save_file."
        )
    sink = open_sink(output)
    sink.write(torch.zeros(3, 1 if output.is_image else 2, height, width))
    sink.finish()
    sink.restart()


def verify_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Decode a whole video file and say what is in it. Raises OutputError when it cannot be played to its end."""
    # `-stats_period` and such differ between releases; `-progress` has been there from the start.
    command = [_ffmpeg_exe(), "-hide_banner", "-nostdin", "-xerror", "-i", f"file:{os.fspath(path)}"]
    command += ["-map", "0:v:0", "-f", "null", "-progress", "pipe:1", "-"]
    run = subprocess.run(command, capture_output=True, check=False)
    words = run.stderr.decode("utf-8", "replace")
    stream = re.search(r"Video: .*?, (\d+)x(\d+)\b.*?([\d.]+) fps", words)
    frames = re.findall(rb"^frame=\s*(\d+)", run.stdout, flags=re.MULTILINE)
    if run.returncode or stream is None or not frames:
        raise OutputError(f"{os.fspath(path)!r} cannot be played: {_last_words(run.stderr)}; write it again.")
    return VideoInfo(int(frames[-1]), int(stream[1]), int(stream[2]), float(stream[3]))


def safe_name(text: str, max_bytes: int = 200) -> str:
    """`text` as a file name that Windows, macOS and Linux accept, at most `max_bytes` long in UTF-8."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    # Characters nobody sees (marks that turn the direction of text, joiners) only make two names look alike.
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Co"))
    text = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029]', "_", text)
    text = text.encode("utf-8")[:max_bytes].decode("utf-8", "ignore").strip(" .")
    if text.split(".")[0].strip().upper() in _WINDOWS_DEVICES:
        text = f"_{text}"
    return text or "_"


def default_file_name(
    task: str,
    size: str,
    ulysses_size: int,
    prompt: str,
    *,
    suffix: str = ".mp4",
    ring_size: int | None = None,
    when: time.struct_time | None = None,
) -> str:
    """Upstream's name for a video without --save_file (2.1's form where `ring_size` is given), safe on every system."""
    words = prompt.replace(" ", "_").replace("/", "_")[:50]
    degrees = [str(degree) for degree in (ulysses_size, ring_size) if degree is not None]
    stamp = time.strftime("%Y%m%d_%H%M%S", when or time.localtime())
    return safe_name("_".join([task, size.replace("*", "x"), *degrees, words, stamp]), max_bytes=240) + suffix


def _ffmpeg_exe() -> str:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MissingPackage(
            f"no ffmpeg to write video with ({error}): pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to one."
        ) from error


def _repeat_last(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[1:3]
    planes = pixels.permute(0, 3, 1, 2).float()
    return nn.functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate").byte().permute(0, 2, 3, 1)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _last_words(log: bytes) -> str:
    lines = [line.strip() for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    return "; ".join(lines[-2:])[-400:]
