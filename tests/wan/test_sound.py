"""Sound in video files: in step from the first frame to the last, and exactly as long as the picture."""

from __future__ import annotations

import re
import subprocess
import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan.conditioning.audio import RATE, open_sound
from wan.engine.errors import OutputError
from wan.utils.utils import merge_video_audio, save_video
from wan.video import Output, Soundtrack, VideoSink, checks, read_metadata, verify_video
from wan.video.ffmpeg import ffmpeg_exe

FPS = 16


def clicks(path: Path, seconds: float, at: list[float]) -> Path:
    """A .wav that is silent but for clicks of 20 ms at these moments."""
    samples = torch.zeros(int(seconds * RATE))
    for moment in at:
        samples[int(moment * RATE) : int(moment * RATE) + 320] = torch.rand(320) * 1.6 - 0.8
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).short().numpy().tobytes())
    return path


def heard(path: Path) -> list[float]:
    """Moments of the clicks in a file, in seconds."""
    loud = (open_sound(path).samples.abs() > 0.2).nonzero().flatten()
    if not len(loud):
        return []
    starts = torch.cat([loud[:1], loud[1:][loud.diff() > 1600]])
    return [round(start / RATE, 2) for start in starts.tolist()]


def lengths(path: Path) -> tuple[float, float]:
    """Seconds of picture and of sound: the time of the last packet, and how long it lasts."""
    found = []
    for stream in ("v", "a"):
        command = [
            ffmpeg_exe(),
            "-hide_banner",
            "-loglevel",
            "error",
            "-i",
            path,
            "-map",
            f"0:{stream}:0",
            "-c",
            "copy",
        ]
        listing = subprocess.run([*command, "-f", "framecrc", "-"], capture_output=True, check=True, text=True).stdout
        base = re.search(r"#tb 0: (\d+)/(\d+)", listing)
        assert base is not None
        rows = [line.split(",") for line in listing.splitlines() if not line.startswith("#")]
        end = max(int(row[2]) + int(row[3]) for row in rows)
        found.append(end * int(base[1]) / int(base[2]))
    return found[0], found[1]


def frames(count: int) -> Tensor:
    return torch.rand(3, count, 32, 48) * 2 - 1


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("seconds", [1.0, 3.0, 10.0])
def test_sound_is_as_long_as_the_picture(suffix: str, seconds: float, tmp_path: Path) -> None:
    sound = clicks(tmp_path / "a.wav", seconds, [0.25])
    path = tmp_path / f"video{suffix}"
    output = Output(path, fps=FPS, metadata={"title": "t"}, sound=Soundtrack(path=sound, seconds=48 / FPS))
    with VideoSink(output) as sink:
        sink.write(frames(37))
        sink.write(frames(11))
    picture, audio = lengths(path)
    assert verify_video(path).frames == 48 and picture == pytest.approx(3.0, abs=0.01)
    assert audio == pytest.approx(3.0, abs=1 / FPS)
    assert read_metadata(path) == {"title": "t"}


def test_sound_is_in_step_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    sound = clicks(tmp_path / "a.wav", 21, [0.5, 10.5, 19.5])
    for start in (0.0, 3 / FPS):
        path = tmp_path / "video.mp4"
        with VideoSink(Output(path, fps=FPS, sound=Soundtrack(path=sound, seconds=20, start=start))) as sink:
            for _ in range(20):
                sink.write(frames(16))
        assert heard(path) == pytest.approx([moment - start for moment in (0.5, 10.5, 19.5)], abs=0.03)


def test_sound_that_cannot_be_encoded_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(OutputError, match=r"video\.mp4"):
        checks.test_encode(Output(tmp_path / "video.mp4", sound=Soundtrack(path=tmp_path / "a.wav", seconds=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_upstreams_merge_ends_with_the_shorter(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    save_video(frames(48)[None], str(path), fps=FPS)
    merge_video_audio(str(path), str(clicks(tmp_path / "a.wav", 2, [0.5])))
    picture, audio = lengths(path)
    assert picture == pytest.approx(2, abs=0.15) and audio == pytest.approx(2, abs=0.1)
    assert heard(path) == pytest.approx([0.5], abs=0.03)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.wav", "video.mp4"]
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"could not put the sound of .*none\.wav.* the video is as it was"):
        merge_video_audio(path, tmp_path / "none.wav")
    assert path.read_bytes() == before
