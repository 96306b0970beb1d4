"""A finished video is never lost or changed: colours, frame counts, names, and every way saving can fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from PIL import Image
from torch import Tensor

from wan import video
from wan.engine.errors import BadRequest, MissingPackage, OutputError
from wan.video import (
    Output,
    PngSink,
    TensorSink,
    VideoSink,
    default_file_name,
    open_sink,
    read_metadata,
    safe_name,
    verify_video,
)

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def moving(frames: int, height: int = 48, width: int = 64) -> Tensor:
    """[3, frames, H, W] in -1..1: a smooth pattern that moves."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([torch.sin((x + t * k) / 9 + y / 7 + k) for k in (1, 2, 3)])


def read_back(path: Path, height: int, width: int) -> Tensor:
    """uint8 [n, H, W, 3], decoded as the BT.709 tags say, with exact rounding."""
    matrix = "scale=in_color_matrix=bt709:in_range=tv:out_range=full:flags=accurate_rnd+full_chroma_int+full_chroma_inp"
    command = [FFMPEG, "-v", "error", "-i", str(path), "-vf", f"{matrix},format=rgb24", "-f", "rawvideo", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, height, width, 3)


def stream_line(path: Path) -> str:
    words = subprocess.run([FFMPEG, "-hide_banner", "-i", str(path)], capture_output=True, text=True).stderr
    return next(line for line in words.splitlines() if "Video:" in line)


LEVELS = (0, 16, 64, 180, 191, 235, 255)
SMPTE = [
    (r, g, b)
    for high, low in ((180, 16), (191, 0), (255, 0))
    for r in (high, low)
    for g in (high, low)
    for b in (high, low)
]
CUBE = [(r, g, b) for r in LEVELS for g in LEVELS for b in LEVELS][::5] + [(g, g, g) for g in range(0, 256, 17)]


# A cube of colours without compression, since x264 itself may move a few pixels by a level; bars as they are saved.
@pytest.mark.parametrize(("bars", "crf"), [(SMPTE, 10), (CUBE, 0)], ids=["SMPTE", "cube"])
def test_colour_bars_survive_within_two_levels(tmp_path: Path, bars: list[tuple[int, int, int]], crf: int) -> None:
    patch, columns = 32, 10
    rows = -(-len(bars) // columns)
    picture = torch.zeros(rows * patch, columns * patch, 3, dtype=torch.uint8)
    inside = torch.zeros(rows * patch, columns * patch, dtype=torch.bool)
    for index, colour in enumerate(bars):
        top, left = index // columns * patch, index % columns * patch
        picture[top : top + patch, left : left + patch] = torch.tensor(colour, dtype=torch.uint8)
        # Colour is stored per 2x2 pixels and coded in blocks: the seam between two bars is no bar.
        inside[top + 10 : top + patch - 10, left + 10 : left + patch - 10] = True
    path = tmp_path / "bars.mp4"
    with VideoSink(Output(path, crf=crf)) as sink:
        sink.write_pixels(picture.expand(5, -1, -1, -1))
    error = (read_back(path, *picture.shape[:2]).int() - picture.int()).abs()[:, inside]
    # 8-bit limited range has 219 steps for 255 levels: half a step of Y and Cb adds up to 2 levels of blue.
    assert error.max() <= 2
    assert error.float().mean() < 0.5


def test_file_is_h264_yuv420p_tagged_bt709_with_its_index_at_the_front(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoSink(Output(path)) as sink:
        sink.write(moving(5))
    line = stream_line(path)
    assert "h264" in line and "yuv420p(tv, bt709" in line
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("fps", "frames"), [(16, 33), (24, 5), (30, 1), (23.976, 7)])
def test_frames_size_and_fps_are_exact(tmp_path: Path, fps: float, frames: int) -> None:
    path = tmp_path / "clip.mp4"
    with open_sink(Output(path, fps=fps)) as sink:
        for chunk in moving(frames).split(4, dim=1):
            sink.write(chunk)
    found = verify_video(path)
    assert found[:3] == (frames, 64, 48)
    assert found.fps == pytest.approx(fps, abs=0.01)  # ffmpeg prints two digits
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_pixels_are_truncated_like_upstreams_writer() -> None:
    values = torch.tensor([-2.0, -1.0, -0.001, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 7).expand(3, 1, 1, 7)
    assert video.to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 127, 127, 254, 255, 255]
    assert video.to_pixels(values.bfloat16()).shape == (1, 1, 7, 3)


def test_odd_sides_are_repeated_not_resized(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    frames = moving(3, 47, 63)
    with VideoSink(Output(path, crf=0)) as sink:
        sink.write(frames)
    assert verify_video(path)[:3] == (3, 64, 48)
    inner = read_back(path, 48, 64)[:, :47, :63].float()
    assert (inner - video.to_pixels(frames).float()).abs().mean() < 3  # chroma of a steep pattern is halved


def test_other_containers(tmp_path: Path) -> None:
    for suffix in (".mov", ".mkv"):
        with open_sink(Output(tmp_path / f"clip{suffix}")) as sink:
            sink.write(moving(2))
        assert verify_video(tmp_path / f"clip{suffix}").frames == 2


def test_restart_forgets_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    sink = VideoSink(Output(path))
    sink.write(moving(9))
    sink.restart()
    assert os.listdir(tmp_path) == []
    sink.write(moving(5, 64, 32))
    sink.close()
    assert verify_video(path)[:3] == (5, 32, 64)
    tensor = TensorSink()
    tensor.write(moving(9))
    tensor.restart()
    for chunk in moving(5).split(2, dim=1):
        tensor.write(chunk)
    tensor.close()
    assert torch.equal(tensor.result, moving(5))


def test_an_exception_leaves_no_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), VideoSink(Output(path)) as sink:
        sink.write(moving(5))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert path.read_bytes() == b"old"


def test_single_frame_becomes_an_exact_png(tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    levels = torch.arange(48).view(1, 1, 6, 8).expand(3, 1, 6, 8) * 5
    with open_sink(Output(path)) as sink:
        sink.write(levels / 255 * 2 - 1)
    with Image.open(path) as image:
        saved = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(6, 8, 3)
    assert torch.equal(saved, levels[:, 0].permute(1, 2, 0).to(torch.uint8))
    with pytest.raises(OutputError, match=r"one frame and 2 came"):
        open_sink(Output(path)).write(moving(2))
    assert os.listdir(tmp_path) == ["frame.png"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": "clip.avi"}, r"'clip\.avi'.*\.mp4"),
        ({"path": "clip"}, r"'clip'.*\.mp4"),
        ({"path": "clip.mp4", "fps": 0}, "fps=0"),
        ({"path": "clip.mp4", "crf": 52}, "crf=52"),
    ],
)
def test_bad_output_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        Output(**fields)


def test_test_encode_makes_the_folder_and_leaves_no_file(tmp_path: Path) -> None:
    for name in ("a/b/clip.mp4", "a/b/frame.png"):
        output = Output(tmp_path / name)
        started = time.monotonic()
        video.test_encode(output, height=96, width=96, num_frames=1 if output.is_image else 81)
        assert time.monotonic() - started < 5
        assert os.listdir(tmp_path / "a" / "b") == []


def test_test_encode_refuses_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match=r"is an image and 81 frames"):
        video.test_encode(Output(tmp_path / "frame.png"), num_frames=81)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        video.test_encode(Output(tmp_path / "folder.mp4"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot write into.*choose another"):
        video.test_encode(Output(tmp_path / "file" / "clip.mp4"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1 << 20))
    with pytest.raises(OutputError, match="1 MiB free and the video may need"):
        video.test_encode(Output(tmp_path / "clip.mp4"), height=720, width=1280, num_frames=81)


# Text in files ------------------------------------------------------------------------------------------------------

PROMPT = (
    "A \"cat\"; #1 = \\ and 'dogs'\r\nsecond line, [STREAM]\n;Stream #0:0: Video: x, 9x9, 9 fps 猫 🎬\t"
    + "long " * 16_000
)
TEXTS = [
    {"title": PROMPT, "comment": json.dumps({"prompt": PROMPT, "seed": 7}, ensure_ascii=False)},
    {"title": "a cat", "wan_settings": PROMPT},
    {"comment": "=", "title": "  spaces kept  "},
]


@pytest.mark.parametrize("metadata", TEXTS, ids=["known names", "own names", "short"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".png"])
def test_text_comes_back_as_it_was(tmp_path: Path, suffix: str, metadata: dict[str, str]) -> None:
    output = Output(tmp_path / f"clip{suffix}", metadata=metadata)
    with open_sink(output) as sink:
        sink.write(moving(1 if output.is_image else 3))
    assert read_metadata(output.path) == metadata
    if not output.is_image:
        assert verify_video(output.path) == (3, 64, 48, 16)
    assert os.listdir(tmp_path) == [output.path.name]


def test_known_names_stand_where_other_programs_look(tmp_path: Path) -> None:
    """In the old form of .mp4 (moov/udta/meta/ilst) the comment is called (c)cmt; in the new one by its whole name."""
    for name in ("comment", "wan"):
        with open_sink(Output(tmp_path / "clip.mp4", metadata={name: "hello"})) as sink:
            sink.write(moving(2))
        data = (tmp_path / "clip.mp4").read_bytes()
        assert (b"\xa9cmt" in data) == (name == "comment")
        assert b"hello" in data


def test_without_metadata_there_is_none_and_nul_is_left_out(tmp_path: Path) -> None:
    for name in ("clip.mp4", "frame.png", "frame.jpg"):
        for metadata, found in (({}, {}), ({"title": "a\0b"}, {} if name == "frame.jpg" else {"title": "ab"})):
            output = Output(tmp_path / name, metadata=metadata)
            with open_sink(output) as sink:
                sink.write(moving(1))
            assert read_metadata(output.path) == found


@pytest.mark.parametrize("name", ["Title", "two words", "", "a=b", "é"])
def test_names_that_no_format_keeps_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="small letters"):
        Output(Path("clip.mp4"), metadata={name: "x"})


@pytest.mark.parametrize("name", ["absent.mp4", "absent.png", "text.mp4", "text.png"])
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    if name.startswith("text"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(BadRequest, match=f"{name}' cannot be read"):
        read_metadata(tmp_path / name)


def test_lost_text_is_a_warning_and_never_costs_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forgetful = executable(
        tmp_path / "ffmpeg", f'exec {FFMPEG} $(echo "$@" | sed s/-map_metadata.1/-map_metadata\\ -1/)'
    )
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(forgetful))
    with open_sink(Output(tmp_path / "clip.mkv", metadata={"title": "cat", "comment": "dog"})) as sink:
        sink.write(moving(2))
    assert verify_video(tmp_path / "clip.mkv").frames == 2
    assert "clip.mkv does not carry its comment, title" in caplog.text


# What can go wrong --------------------------------------------------------------------------------------------------


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def failure(output: Output, chunks: int = 50) -> str:
    """The message of a sink that must fail; it says one thing once, in one line that can be continued."""
    with pytest.raises(OutputError) as caught, open_sink(output) as sink:
        for _ in range(chunks):
            sink.write(moving(9))
    message = str(caught.value)
    assert str(output.path) in message and "\n" not in message
    assert not message.endswith((".", ";")) and message.count("could not write") == 1
    assert message.count("--save_file") <= 1
    return message


def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path) -> None:
    """/dev/full takes no byte: ffmpeg itself meets the error, and what it wrote to is removed."""
    (tmp_path / "clip.mp4.part").symlink_to("/dev/full")
    message = failure(Output(tmp_path / "clip.mp4"))
    assert "the disk is full (" in message and "No space left on device" in message
    assert f"MiB are free in '{tmp_path}'); make room or choose another --save_file" in message
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_is_found_at_the_next_frames_and_not_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    for sink in (VideoSink(Output(tmp_path / "clip.mp4")), PngSink(tmp_path / "clip_frames")):
        sink.write(moving(9))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=300 << 10))
            with pytest.raises(OutputError, match=r"the disk is full \(at frame 10, 0\.3 MiB are free in .*make room"):
                sink.write(moving(9))
        assert os.listdir(tmp_path) == []


def test_a_killed_encoder_is_named_as_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(executable(tmp_path / "ffmpeg", "kill -9 $$")))
    assert re.search(
        r"ended by signal 9 \(Killed\) after \d+ frames; if memory", failure(Output(tmp_path / "clip.mp4"))
    )
    assert os.listdir(tmp_path) == ["ffmpeg"]


def test_an_encoder_that_dies_after_the_last_frame_is_an_error_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(executable(tmp_path / "ffmpeg", "cat > /dev/null; exit 7")))
    sink = VideoSink(Output(tmp_path / "clip.mp4"))
    sink.write(moving(3))
    with pytest.raises(OutputError, match="ffmpeg ended with status 7, after 3 frames; .*IMAGEIO_FFMPEG_EXE"):
        sink.close()
    sink.restart()  # and the frames may come again, elsewhere


def test_an_ffmpeg_that_vanished_is_an_output_error_with_the_frames_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
        assert "ffmpeg does not start" in failure(Output(tmp_path / "clip.mp4"))

    def absent() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    assert "pip install imageio-ffmpeg" in failure(Output(tmp_path / "clip.mp4"))
    assert os.listdir(tmp_path) == []


def test_every_failure_leaves_nothing_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    output = Output(tmp_path / "clip.mp4", metadata=TEXTS[2])
    with open_sink(output) as sink:
        sink.write(moving(2))
    assert os.listdir(tmp_path) == ["clip.mp4"]
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    failure(output)
    assert os.listdir(tmp_path) == ["clip.mp4"]


# Frames as PNG ------------------------------------------------------------------------------------------------------


def test_png_frames_are_the_pixels_a_video_is_made_of(tmp_path: Path) -> None:
    frames = moving(5)
    sink = PngSink(tmp_path / "clip_frames", metadata={"comment": PROMPT})
    for chunk in frames.split(2, dim=1):
        sink.write(chunk)
        assert os.listdir(tmp_path) == ["clip_frames.part"]  # the name is for what is complete
    sink.close()
    assert os.listdir(tmp_path) == ["clip_frames"] == [sink.folder.name]
    names = sorted(os.listdir(sink.folder))
    assert names == [f"{number:06d}.png" for number in range(1, 6)]
    for name, pixels in zip(names, video.to_pixels(frames), strict=True):
        with Image.open(sink.folder / name) as image:
            assert image.tobytes() == pixels.numpy().tobytes()
    assert read_metadata(sink.folder / names[4]) == {"comment": PROMPT}


def test_png_frames_of_before_are_never_overwritten_but_unfinished_ones_go(tmp_path: Path) -> None:
    (tmp_path / "clip_frames.part").mkdir()
    (tmp_path / "clip_frames.part" / "000009.png").write_bytes(b"of a run that was killed")
    for expected in ("clip_frames", "clip_frames_2", "clip_frames_3"):
        with PngSink(tmp_path / "clip_frames") as sink:
            sink.write(moving(2))
        assert sink.folder == tmp_path / expected
        assert len(os.listdir(sink.folder)) == 2
    assert len(os.listdir(tmp_path)) == 3


def test_png_frames_restart_and_leave_nothing_after_a_failure(tmp_path: Path) -> None:
    sink = PngSink(tmp_path / "clip_frames")
    sink.write(moving(5))
    sink.restart()
    assert os.listdir(tmp_path) == []
    sink.write(moving(2))
    (sink.part / "000002.png").write_bytes(b"damaged")
    with pytest.raises(OutputError, match=r"clip_frames.*frame 2 cannot be read back"):
        sink.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(OutputError, match="no frame was decoded"):
        sink.close()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"clip_frames.*Not a directory; choose another --save_file"):
        PngSink(tmp_path / "file" / "clip_frames").write(moving(1))


def test_missing_folder_is_an_error_with_path_reason_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "clip.mp4"
    with (
        pytest.raises(OutputError, match=r"clip\.mp4.*No such file.*another --save_file"),
        VideoSink(Output(path)) as sink,
    ):
        for _ in range(50):
            sink.write(moving(9))


def test_an_encoder_that_dies_is_an_error_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text(
        '#!/bin/sh\ntouch "$(dirname "$0")/clip.mp4.part"\necho \'No space left on device\' >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    with (
        pytest.raises(OutputError, match=r"clip\.mp4.*No space left on device"),
        VideoSink(Output(tmp_path / "clip.mp4")) as sink,
    ):
        for _ in range(50):
            sink.write(moving(9))
    assert os.listdir(tmp_path) == ["ffmpeg"]


def test_a_file_that_lost_frames_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An encoder that reports success but drops the end of the video.
    lossy = tmp_path / "ffmpeg"
    lossy.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*rawvideo*) head -c 27648 | {FFMPEG} "$@" ; cat > /dev/null ;;\n'
        f'*) exec {FFMPEG} "$@" ;;\n'
        "esac\n"
    )
    lossy.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(lossy))
    sink = VideoSink(Output(tmp_path / "clip.mp4"))
    sink.write(moving(9))
    with pytest.raises(OutputError, match="holds 3 frames of 64x48 instead of 9 frames"):
        sink.close()
    assert os.listdir(tmp_path) == ["ffmpeg"]


def test_no_ffmpeg_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    with pytest.raises(MissingPackage, match="pip install imageio-ffmpeg"):
        video.test_encode(Output(tmp_path / "clip.mp4"))


def test_damaged_file_cannot_be_verified(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoSink(Output(path)) as sink:
        sink.write(moving(9))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OutputError, match=r"clip\.mp4.*cannot be played"):
        verify_video(path)
    with pytest.raises(OutputError, match="cannot be played"):
        verify_video(tmp_path / "absent.mp4")


AWKWARD = [
    'a*b?c:d|e"f<g>h\ti\nj',
    "x" * 300,
    "🎬 猫 " * 80,
    "CON",
    "nul.txt",
    "../../etc/passwd",
    " . ",
    "",
    "%05d",
    "-y",
]


@pytest.mark.parametrize("prompt", AWKWARD)
def test_any_prompt_gives_a_name_every_system_takes(tmp_path: Path, prompt: str) -> None:
    for name in (
        safe_name(prompt) + ".mp4",
        default_file_name("t2v-A14B", "1280*720", 1, prompt),
    ):
        assert not set(name) & set('<>:"/\\|?*\t\n')
        assert len(name.encode()) <= 250  # room for .part
        assert name.split(".")[0].upper() not in {"CON", "NUL"}
        assert not name.startswith((".", " "))
        (tmp_path / name).write_bytes(b"")


def test_videos_with_awkward_names_are_written(tmp_path: Path) -> None:
    for prompt in ("".join(AWKWARD[:1]), AWKWARD[2], "%05d"):
        with VideoSink(Output(tmp_path / default_file_name("t2v-demo", "96*96", 1, prompt))) as sink:
            sink.write(moving(2))
        assert verify_video(sink.path).frames == 2


def test_default_name_follows_upstreams_rule() -> None:
    when = time.struct_time((2025, 7, 28, 9, 5, 3, 0, 209, 0))
    prompt = "Two cats/dogs walk " + "on and " * 20
    name = default_file_name("t2v-A14B", "1280*720", 2, prompt, when=when)
    assert name == f"t2v-A14B_1280x720_2_{prompt.replace(' ', '_').replace('/', '_')[:50]}_20250728_090503.mp4"
    image = default_file_name("t2i-14B", "1024*1024", 1, "a cat", suffix=".png", ring_size=1, when=when)
    assert image == "t2i-14B_1024x1024_1_1_a_cat_20250728_090503.png"
