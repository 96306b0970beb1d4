"""Sound into what a speaking model needs: samples of any file ffmpeg reads, and features counted in video frames.

Upstream's arithmetic: the speech model makes 50 entries a second, which are interpolated to 30, of which each video
frame takes one.

Letters: A width of the features, K entries.
"""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.video import ffmpeg

__all__ = ["RATE", "Sound", "clip_features", "clips_of", "entries_of", "frames_of", "open_sound", "resampled"]

RATE = 16000
"""Samples a second that speech models hear."""

MODEL_FPS, FEATURE_FPS = 50, 30
"""Entries a second: of the speech model, and of the features that frames are taken from."""

_LAYERS = ((10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2)
"""Kernel and stride of the convolutions that wav2vec2 hears through."""

SHORTEST = 400
"""Samples: one entry of the speech model."""


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A file's sound: float32 mono samples [n] in -1..1 at 16 kHz."""

    path: Path
    samples: Tensor

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def open_sound(path: str | os.PathLike[str], flag: str = "--audio") -> Sound:
    """The sound of an audio or video file, all channels mixed into one. Raises BadRequest naming `flag`."""
    given = f"{flag} {os.fspath(path)!r}"
    place = Path(path).expanduser()
    if not place.is_file():
        raise BadRequest(f"{given}: there is no such file")
    command = [ffmpeg.ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-i", f"file:{place}"]
    command += ["-map", "0:a:0", "-ar", str(RATE), "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        silent = b"matches no streams" in done.stderr
        said = "it holds no sound" if silent else ffmpeg.last_words(done.stderr)
        raise BadRequest(f"{given} cannot be read as sound: {said}; pass another file")
    samples = _mixed(done.stdout)
    if len(samples) < SHORTEST:
        raise BadRequest(f"{given} lasts {len(samples) / RATE:.3f} s; at least {SHORTEST / RATE} s are needed")
    if not bool(torch.isfinite(samples).all()):
        raise BadRequest(f"{given} holds NaN or infinity; pass another file")
    return Sound(path=place.resolve(), samples=samples)


def _mixed(wav: bytes) -> Tensor:
    """The mean of all channels of a .wav of float32, as upstream mixes; ffmpeg's own mixing is louder."""
    channels, begin = int.from_bytes(wav[22:24], "little"), wav.find(b"data") + 8
    content = wav[begin:]
    whole = len(content) - len(content) % (4 * max(channels, 1))
    if begin < 8 or not whole:
        return torch.empty(0)
    return torch.frombuffer(bytearray(content[:whole]), dtype=torch.float32).view(-1, channels).mean(1)


def resampled(states: Tensor) -> Tensor:
    """The speech model's entries [layers, K, A], 50 a second, as 30 a second."""
    count = int(states.shape[1] / MODEL_FPS * FEATURE_FPS)
    return F.interpolate(states.transpose(1, 2), size=count, mode="linear", align_corners=True).transpose(1, 2)


def entries_of(samples: int) -> int:
    """How many entries, 30 a second, that many samples make."""
    for kernel, stride in _LAYERS:
        samples = (samples - kernel) // stride + 1
    return int(samples / MODEL_FPS * FEATURE_FPS)


def clips_of(entries: int, frames: int, fps: float) -> int:
    """How many clips of `frames` frames the features last; the last one is silent towards its end."""
    return int(entries / (frames * FEATURE_FPS / fps)) + 1


def clip_features(features: Tensor, frames: int, fps: float) -> Tensor:
    """[1, layers, A, clips x frames]: of features [layers, K, A] at 30 a second, the one each frame hears.

    Zeros beyond the end.
    """
    count = clips_of(features.shape[1], frames, fps) * frames
    # Python and upstream's NumPy round halves alike, to even.
    index = torch.tensor([round(frame / fps * FEATURE_FPS) for frame in range(count)])
    room = max(0, int(index[-1]) + 1 - features.shape[1])
    padded = F.pad(features, (0, 0, 0, room))
    return padded[:, index].transpose(1, 2)[None]


def frames_of(seconds: float, fps: float) -> int:
    """The frames that a sound of `seconds` needs to be heard to its end."""
    return math.ceil(round(seconds * fps, 6))
