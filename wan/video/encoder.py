"""The video file: frames stream into ffmpeg, and the file is read back before it gets its name."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from torch import Tensor, nn

from wan.engine.errors import BadRequest, MissingPackage, OutputError
from wan.video.ffmpeg import ffmpeg_exe, last_words, read_tags, tag_file, verify_video
from wan.video.files import MUXERS, FileSink, Output, free_bytes, is_full, reason_of
from wan.video.sound import sound_arguments

_OTHER_FFMPEG = "try another ffmpeg through the variable IMAGEIO_FFMPEG_EXE"
# What .mp4 keeps where every program looks for it; other names need a newer form that fewer read. In .mov the old
# form ends at 64 KiB.
_KNOWN_TAGS = {"title", "comment", "description", "artist", "copyright"}

# RGB is full range; H.264 players expect limited-range BT.709, and must be told so or they guess by size.
# "area" averages 2x2 chroma exactly (bicubic overshoots at edges, by up to 4 levels), the other flags round correctly.
_TO_BT709 = (
    "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=area+accurate_rnd+full_chroma_int+full_chroma_inp,"
    "format=yuv420p,setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
)
_BT709_TAGS = ["-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709", "-color_range", "tv"]


class VideoSink(FileSink):
    """Streams frames into ffmpeg: H.264, yuv420p, tagged BT.709, index at the front, `output.metadata` inside.

    All frames have one size; an odd side gets its last row or column twice, because yuv420p stores colour per 2x2.
    """

    def __init__(self, output: Output) -> None:
        super().__init__(output.path)
        self.output = output
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._tags: Path | None = None
        self._size = (0, 0)

    def write_pixels(self, pixels: Tensor) -> None:
        height, width = pixels.shape[1:3]
        if height % 2 or width % 2:
            pixels = _repeat_last(pixels)
            height, width = pixels.shape[1:3]
        # ffmpeg holds frames back and would meet a full disk many frames later, after the next hours of decoding.
        if is_full(free_bytes(self.path.parent)):
            raise self.fail(f"at frame {self.frames + 1}")
        if self._ffmpeg is None:
            self._start(height, width)
        if (height, width) != self._size:
            raise self.fail(f"a frame of {width}x{height} came after frames of {self._size[1]}x{self._size[0]}")
        if self._ffmpeg.poll() is not None:
            raise self._ended()
        try:
            self._ffmpeg.stdin.write(memoryview(pixels.cpu().contiguous().numpy()).cast("B"))
        except OSError as error:
            raise self._ended() from error
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
            raise self._failed(ffmpeg.returncode, words)
        try:
            found = verify_video(self.part)
        except (OutputError, MissingPackage) as error:
            raise self.fail(f"the file was written, but {error}", _OTHER_FFMPEG) from error
        if (found.frames, found.height, found.width) != (self.frames, *self._size):
            holds = f"the file holds {found.frames} frames of {found.width}x{found.height}"
            wrote = f"{self.frames} frames of {self._size[1]}x{self._size[0]}"
            raise self.fail(f"{holds} instead of {wrote}", _OTHER_FFMPEG)
        self._check_tags()

    def _start(self, height: int, width: int) -> None:
        muxer = MUXERS[self.path.suffix.lower()]
        try:
            # Files, not pipes: nobody reads while frames are written, and a full pipe would block ffmpeg.
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _ending)
            command = [ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
            heard, how = sound_arguments(self.output.sound, index=1)
            command += ["-framerate", f"{self.output.fps:g}", "-i", "pipe:0", *heard, *self._tag_arguments(), *how]
            command += ["-map", "0:v", "-vf", _TO_BT709, "-c:v", "libx264", "-crf", str(self.output.crf), *_BT709_TAGS]
            if muxer != "matroska":
                command += ["-movflags", "+faststart+use_metadata_tags" if self._needs_new_tags() else "+faststart"]
            command += ["-f", muxer, f"file:{self.part}"]
            # Its own session, so that Ctrl-C reaches the program alone, which then removes the part.
            self._ffmpeg = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, start_new_session=True
            )
        except OSError as error:
            self._clean()
            what = error.filename or tempfile.gettempdir()
            raise self.fail(f"ffmpeg does not start ({what!r}: {reason_of(error)})", _OTHER_FFMPEG) from error
        except MissingPackage as error:
            self._clean()
            raise self.fail(str(error)) from error
        self._size = (height, width)

    def _needs_new_tags(self) -> bool:
        return self.path.suffix.lower() == ".mov" or not self.output.metadata.keys() <= _KNOWN_TAGS

    def _tag_arguments(self) -> list[str]:
        if not self.output.metadata:
            return []
        handle, name = tempfile.mkstemp(suffix=".ffmetadata")
        self._tags = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(tag_file(self.output.metadata))
        index = 1 if self.output.sound is None else 2
        return ["-f", "ffmetadata", "-i", f"file:{name}", "-map_metadata", str(index)]

    def _check_tags(self) -> None:
        """Warn where this ffmpeg has lost text: the video is worth more than what is said about it."""
        wanted = {name: text.replace("\0", "") for name, text in self.output.metadata.items()}
        try:
            lost = sorted(wanted.items() - read_tags(self.part).items()) if wanted else []
        except BadRequest:
            lost = sorted(wanted.items())
        if lost:
            names = ", ".join(name for name, _ in lost)
            logging.getLogger(__name__).warning("%s does not carry its %s: %s", self.path, names, _OTHER_FFMPEG)

    def _ended(self) -> OutputError:
        """The error of an ffmpeg that ended before its input did."""
        assert self._ffmpeg is not None
        ffmpeg = self._ffmpeg
        words = self._ending()
        return self._failed(ffmpeg.returncode, words)

    def _failed(self, status: int, words: str) -> OutputError:
        frames = f"after {self.frames} frames"
        if status < 0:
            signal_name = signal.strsignal(-status) or "unknown"
            return self.fail(
                f"ffmpeg was ended by signal {-status} ({signal_name}) {frames}",
                "if memory ran out, end other programs",
            )
        reason = words or f"ffmpeg ended with status {status}"
        return self.fail(f"{reason}, {frames}", f"choose another --save_file, or {_OTHER_FFMPEG}")

    def _ending(self) -> str:
        """Close ffmpeg's input, wait for it, and return its last words."""
        assert self._ffmpeg is not None and self._log is not None
        with contextlib.suppress(OSError):  # it may have ended already; its words say why
            self._ffmpeg.stdin.close()
        self._ffmpeg.wait()
        self._ffmpeg = None
        self._log.seek(0)
        words = last_words(self._log.read())
        self._clean()
        return words

    def _clean(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._tags is not None:
            self._tags.unlink(missing_ok=True)
        self._log = self._tags = None


def _repeat_last(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[1:3]
    planes = pixels.permute(0, 3, 1, 2).float()
    return nn.functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate").byte().permute(0, 2, 3, 1)
