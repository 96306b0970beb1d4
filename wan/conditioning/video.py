"""Frames of a video file, chosen, fitted and read piece by piece, so that no video is ever held whole.

Choosing and fitting follow upstream's `wan/utils/vace_processor.py`: frames are spread evenly over the whole video, its
shape is kept, and its area is what the model's token budget allows. Frames are read through ffmpeg, at the file's
average rate where it varies.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.video import ffmpeg

__all__ = ["Choice", "Clip", "Source", "choose", "fit", "open_control", "open_video", "read_frames", "spread"]

CHUNK = 4
"""Frames the VAE takes at a time, after a first one of its own."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A video file that was decoded to its end. `width` and `height` are as shown, upright."""

    path: Path
    width: int
    height: int
    frames: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is taken of a video: the numbers of its frames, in order, and the (height, width) they are fitted to."""

    frames: tuple[int, ...]
    size: tuple[int, int]
    fps: float


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames of a file in -1..1, or of a mask (`is_mask`) in 0..1 from its first channel; read anew at each pass."""

    source: Source
    frames: tuple[int, ...]
    size: tuple[int, int]
    is_mask: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[C, T, H, W] of all frames together."""
        return (1 if self.is_mask else 3, len(self.frames), *self.size)

    def chunks(self) -> Iterator[Tensor]:
        """One frame [C, 1, H, W], then four at a time [C, 4, H, W]: the pieces the VAE takes."""
        pieces = [self.frames[:1], *(self.frames[i : i + CHUNK] for i in range(1, len(self.frames), CHUNK))]
        for piece in read_frames(self.source, pieces):
            fitted = fit(piece, *self.size)
            yield ((fitted[:1] + 1) / 2).clamp(0, 1) if self.is_mask else fitted

    def tensor(self) -> Tensor:
        """All frames [C, T, H, W] at once."""
        return torch.cat(list(self.chunks()), dim=1)


def open_control(
    video: str | os.PathLike[str], mask: str | os.PathLike[str] | None, num_frames: int, size: tuple[int, int]
) -> tuple[Clip, Clip | None]:
    """The frames taken of a control video and of its mask, for a model asked for a video of `size` (width, height).

    The result has the shape of the video; size and `num_frames` are its budget. A mask of one frame serves them all.
    Raises BadRequest for files that cannot be read or do not go together.
    """
    source, (width, height) = open_video(video, "--src_video"), size
    tokens = (width // 16) * (height // 16) * ((num_frames - 1) // CHUNK + 1)
    choice = choose(source, frames=source.frames, area=width * height, tokens=tokens)
    clip = Clip(source=source, frames=choice.frames, size=choice.size)
    if mask is None:
        return clip, None
    cut = open_video(mask, "--src_mask")
    if (cut.width, cut.height) != (source.width, source.height):
        raise BadRequest(
            f"--src_mask {os.fspath(mask)!r} is {cut.width}x{cut.height}, --src_video {os.fspath(video)!r} "
            f"{source.width}x{source.height}: they must be of one size"
        )
    if cut.frames not in (1, source.frames):
        raise BadRequest(
            f"--src_mask {os.fspath(mask)!r} has {cut.frames} frames, --src_video {os.fspath(video)!r} "
            f"{source.frames}: give one for each, or a single one for all"
        )
    frames = (0,) * len(clip.frames) if cut.frames == 1 else clip.frames
    return clip, Clip(source=cut, frames=frames, size=clip.size, is_mask=True)


def open_video(path: str | os.PathLike[str], flag: str) -> Source:
    """What a video holds, every frame of it decoded once. Raises BadRequest naming `flag` when it cannot be."""
    if not Path(path).expanduser().is_file():
        raise BadRequest(f"{flag} {os.fspath(path)!r}: there is no such file")
    path = Path(path).expanduser().resolve()
    return _opened(path, flag, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _opened(path: Path, flag: str, changed: int) -> Source:
    """A file is gone through once, however often it is asked for."""
    given = f"{flag} {str(path)!r}"
    _, header, _ = _run(["-i", _url(path)])
    stream = re.search(r"^\s*Stream #.*?: Video: (.*)$", header, flags=re.MULTILINE)
    if stream is None:
        said = "it holds no picture" if "Input #0" in header else ffmpeg.last_words(header.encode())
        raise BadRequest(f"{given} cannot be read as a video: {said}; pass another file")
    source = Source(path=path, width=0, height=0, frames=0, fps=_rate(stream[1]))
    status, log, progress = _run(["-xerror", *_decode(source), "-f", "null", "-progress", "pipe:1", "-"])
    counts, sizes = re.findall(r"^frame=\s*(\d+)", progress, flags=re.MULTILINE), _shown_size(log)
    if status or not counts or not int(counts[-1]) or sizes is None:
        raise BadRequest(
            f"{given} cannot be decoded to its end: {ffmpeg.last_words(log.encode())}; it is damaged or holds no "
            "picture, pass another file"
        )
    return replace(source, width=sizes[0], height=sizes[1], frames=int(counts[-1]))


def choose(source: Source, *, frames: int, area: int, tokens: int, step: tuple[int, int, int] = (4, 16, 16)) -> Choice:
    """Upstream's choice from the first `frames` of a video: at most `area` pixels and `tokens` blocks of `step`.

    A video smaller than the area stays small and may be longer for it. Raises BadRequest for one smaller than a block.
    """
    time, down, across = step
    blocks = min(tokens, area / (down * across), (source.height // down) * (source.width // across))
    if blocks < 1:
        raise BadRequest(
            f"{str(source.path)!r} is {source.width}x{source.height}; the smallest video that can be used is "
            f"{across}x{down}"
        )
    latent_frames = min((frames - 1) // time + 1, int(tokens / blocks))
    blocks = min(blocks, int(tokens / latent_frames))
    rows = max(round((blocks * source.height / source.width) ** 0.5), 1)
    columns = max(int(blocks / rows), 1)
    count = (latent_frames - 1) * time + 1
    seconds = (frames - 0.5) / source.fps
    return Choice(frames=spread(frames, count), size=(rows * down, columns * across), fps=count / seconds)


def spread(available: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` frames spread evenly over `available`, from the first to the last.

    A moment on the border of two frames belongs to the earlier one; the moments end in the middle of the last frame.
    """
    if count == 1:
        return (0,)
    # ceil(t) - 1 at t = i * (available - 1/2) / (count - 1), in integers.
    last, parts = 2 * available - 1, 2 * (count - 1)
    return tuple(max(0, -(-i * last // parts) - 1) for i in range(count))


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 frames [T, H, W, 3], scaled to cover the size and cut at the centre, as float32 [3, T, H', W'] in -1..1."""
    video = frames.permute(0, 3, 1, 2)
    rows, columns = video.shape[2:]
    if (rows, columns) != (height, width):
        scale = max(width / columns, height / rows)
        covering = max(round(scale * rows), height), max(round(scale * columns), width)
        video = F.interpolate(video, size=covering, mode="bicubic", antialias=True)
        top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
        video = video[:, :, top : top + height, left : left + width]
    return video.transpose(0, 1).float() / 127.5 - 1


def read_frames(source: Source, pieces: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """uint8 [n, H, W, 3] for each piece of frame numbers, which never fall, in one pass. Raises BadRequest."""
    bytes_each = source.height * source.width * 3
    command = [ffmpeg.ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", *_decode(source)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        number, frame = -1, torch.empty(0)
        try:
            for piece in pieces:
                chosen = []
                for wanted in piece:
                    while number < wanted:
                        raw = process.stdout.read(bytes_each)
                        if len(raw) < bytes_each:
                            log.seek(0)
                            raise BadRequest(
                                f"{str(source.path)!r} ended after {number + 1} of {source.frames} frames "
                                f"({ffmpeg.last_words(log.read()) or 'it was changed while it was read'})"
                            )
                        number += 1
                    frame = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
                    chosen.append(frame.view(source.height, source.width, 3))
                yield torch.stack(chosen)
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _decode(source: Source) -> list[str]:
    """Every frame of the first video track, upright, at a constant rate: what counts frames and what reads them."""
    return ["-i", _url(source.path), "-map", "0:v:0", "-an", "-sn", "-vf", f"fps={source.fps:.9g}"]


def _rate(stream: str) -> float:
    """Frames per second from ffmpeg's line on a track, which has two decimals: 23.98 is 24000/1001."""
    found = re.search(r"([\d.]+)(k?) fps", stream)
    said = float(found[1]) * (1000 if found[2] else 1) if found else 0.0
    exact = round(said * 1.001) / 1.001
    return exact if abs(exact - said) < 0.006 and said != round(said) else said or 1.0


def _url(path: str | os.PathLike[str]) -> str:
    return f"file:{os.fspath(path)}"


def _run(arguments: Sequence[str]) -> tuple[int, str, str]:
    """(exit status, what ffmpeg said, what it wrote)."""
    done = subprocess.run(
        [ffmpeg.ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments], capture_output=True, check=False
    )
    return done.returncode, done.stderr.decode("utf-8", "replace"), done.stdout.decode("utf-8", "replace")


def _shown_size(log: str) -> tuple[int, int] | None:
    """(width, height) of what comes out: the input's lines give it before it is turned upright."""
    found = re.findall(r"^\s*Stream #.*?: Video: .*?, (\d+)x(\d+)\b", log.partition("Output #0")[2], flags=re.MULTILINE)
    return (int(found[0][0]), int(found[0][1])) if found else None
