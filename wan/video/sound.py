"""Sound in video files: beside frames as they are encoded, or put into a file that is finished."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from wan.engine.errors import OutputError
from wan.video.ffmpeg import ffmpeg_exe, last_words
from wan.video.files import Soundtrack, reason_of

__all__ = ["merge_sound", "sound_arguments"]

_CODEC = ["-c:a", "aac", "-b:a", "192k"]


def sound_arguments(sound: Soundtrack | None, index: int) -> tuple[list[str], list[str]]:
    """What ffmpeg is told of a soundtrack as its input number `index`, and of the output it goes to beside a video.

    The length is said outright: "-shortest" lets sound run on by a second now and then.
    """
    if sound is None:
        return [], []
    start = ["-ss", f"{sound.start:.6f}"] if sound.start else []
    heard = [*start, "-i", f"file:{sound.path}"]
    return heard, ["-map", f"{index}:a:0", "-af", f"apad,atrim=end={sound.seconds:.6f}", *_CODEC]


def merge_sound(video: str | os.PathLike[str], sound: str | os.PathLike[str]) -> None:
    """Put the sound of a file into a video, in place, the picture as it is; both end with the shorter one.

    Raises OutputError; then the video is as it was.
    """
    path = Path(video)
    part = path.with_name(f"{path.stem}_temp{path.suffix}")
    command = [ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", "-i", f"file:{path}"]
    command += ["-i", f"file:{os.fspath(sound)}", "-c:v", "copy", *_CODEC, "-map", "0:v:0", "-map", "1:a:0"]
    command += ["-map_metadata", "0", "-movflags", "+faststart+use_metadata_tags", "-shortest", f"file:{part}"]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        if done.returncode:
            raise OutputError(
                f"could not put the sound of {os.fspath(sound)!r} into {str(path)!r}: {last_words(done.stderr)}; the "
                "video is as it was, without sound"
            )
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"could not replace {str(path)!r} ({reason_of(error)}); it is without sound") from error
    finally:
        part.unlink(missing_ok=True)
