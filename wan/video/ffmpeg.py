"""What is asked of ffmpeg besides encoding: does a file play to its end, what text is in it; and ffmpeg's words."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from wan.engine.errors import BadRequest, MissingPackage, OutputError

_OWN_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder"}
_TAG = re.compile(r"\[.*?\]\n|((?:[^\\=\n]|\\.)*)=((?:[^\\\n]|\\.)*)\n", flags=re.DOTALL)


class VideoInfo(NamedTuple):
    """What `verify_video` found in a file."""

    frames: int
    width: int
    height: int
    fps: float


def verify_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Decode a whole video file and say what is in it. Raises OutputError when it cannot be played to its end."""
    # `-stats_period` and such differ between releases; `-progress` has been there from the start.
    command = [ffmpeg_exe(), "-hide_banner", "-nostdin", "-xerror", "-i", f"file:{os.fspath(path)}"]
    command += ["-map", "0:v:0", "-f", "null", "-progress", "pipe:1", "-"]
    run = subprocess.run(command, capture_output=True, check=False)
    words = run.stderr.decode("utf-8", "replace")
    stream = re.search(r"^\s*Stream #.*?: Video: .*?, (\d+)x(\d+)\b.*?([\d.]+) fps", words, flags=re.MULTILINE)
    frames = re.findall(rb"^frame=\s*(\d+)", run.stdout, flags=re.MULTILINE)
    if run.returncode or stream is None or not frames:
        raise OutputError(f"{os.fspath(path)!r} cannot be played: {last_words(run.stderr)}; write it again")
    return VideoInfo(int(frames[-1]), int(stream[1]), int(stream[2]), float(stream[3]))


def read_tags(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text a video carries, by name in small letters, without what ffmpeg adds. Raises BadRequest."""
    command = [ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-i", f"file:{os.fspath(path)}"]
    run = subprocess.run([*command, "-f", "ffmetadata", "pipe:1"], capture_output=True, check=False)
    if run.returncode:
        raise BadRequest(f"{os.fspath(path)!r} cannot be read as a video: {last_words(run.stderr)}; name another file")
    found = {}
    for match in _TAG.finditer(run.stdout.decode("utf-8", "replace").partition("\n")[2]):
        if match[1] is None:  # [STREAM], [CHAPTER]: what follows belongs to a part of the file
            break
        name, value = (re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) for text in match.groups())
        found[name.lower()] = value
    return {name: value for name, value in found.items() if name not in _OWN_TAGS}


def tag_file(metadata: Mapping[str, str]) -> bytes:
    """The file from which ffmpeg takes text of any length and with any character but NUL."""
    lines = [";FFMETADATA1"] + [f"{name}={_escaped(value)}" for name, value in metadata.items()]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _escaped(text: str) -> str:
    return re.sub(r"[=;#\\\r\n]", lambda match: "\\" + match[0], text.replace("\0", ""))


def ffmpeg_exe() -> str:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MissingPackage(
            f"no ffmpeg to write video with ({error}): pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to one"
        ) from error


def last_words(log: bytes) -> str:
    lines = [line.strip() for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    return "; ".join(lines[-2:])[-400:]
