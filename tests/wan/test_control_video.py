"""Frames of a video file: which are taken, how they are fitted, that they are the right ones, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wan.conditioning.video import Clip, Source, choose, fit, open_control, open_video, spread
from wan.engine.errors import BadRequest
from wan.utils.vace_processor import VaceVideoProcessor
from wan.video.ffmpeg import ffmpeg_exe

Film = Callable[..., Path]


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """Writes a lossless video whose frame i is of the grey level 7 i + 3, with a white left half if asked."""

    def write(name: str = "clip.mkv", frames: int = 17, size: tuple[int, int] = (64, 48), fps: str = "16") -> Path:
        width, height = size
        pixels = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
        pixels += (torch.arange(frames) * 7 + 3).to(torch.uint8)[:, None, None, None]
        command = [ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{height}", "-r", fps, "-i", "-", "-c:v", "ffv1", str(tmp_path / name)]
        subprocess.run(command, input=pixels.numpy().tobytes(), check=True)
        return tmp_path / name

    return write


def source(frames: int = 81, width: int = 832, height: int = 480, fps: float = 16.0) -> Source:
    return Source(path=Path("clip.mp4"), width=width, height=height, frames=frames, fps=fps)


# Which frames, which size ---------------------------------------------------------------------------------------------

A480, T480 = 480 * 832, 32760
A720, T720 = 720 * 1280, 75600


@pytest.mark.parametrize(
    ("given", "area", "tokens", "count", "size"),
    [
        (source(), A480, T480, 81, (480, 832)),
        (source(300), A480, T480, 81, (480, 832)),  # longer: the budget holds 21 latent frames
        (source(50), A480, T480, 49, (480, 832)),  # shorter: the largest 4n+1
        (source(81, 480, 832), A480, T480, 81, (832, 480)),  # portrait stays portrait
        (source(81, 1920, 1080), A480, T480, 81, (480, 832)),  # 30 rows of 52 are nearest to 16:9 in 1560 blocks
        (source(81, 1920, 1080), A720, T720, 81, (720, 1280)),
        (source(500, 320, 240), A480, T480, 437 - 4, (240, 320)),  # small: stays small and may be longer
        (source(81, 1000, 1000), A480, T480, 81, (624, 640)),  # 39 rows, and what 1560 blocks leave of columns
        (source(1, 640, 640), A480, T480, 1, (624, 640)),
    ],
)
def test_the_choice_is_upstreams(given: Source, area: int, tokens: int, count: int, size: tuple[int, int]) -> None:
    choice = choose(given, frames=given.frames, area=area, tokens=tokens)
    assert len(choice.frames) == count and choice.size == size
    assert choice.frames[0] == 0 and (count == 1 or choice.frames[-1] == given.frames - 1)


def test_frames_are_spread_evenly_and_a_fitting_video_is_taken_as_it_is() -> None:
    assert spread(17, 17) == tuple(range(17))
    assert spread(81, 81) == tuple(range(81))
    # Moments 0, 2.375, 4.75, 7.125, 9.5 in units of a frame.
    assert spread(10, 5) == (0, 2, 4, 7, 9)
    assert spread(13, 5) == (0, 3, 6, 9, 12)
    assert spread(5, 1) == (0,)


def test_a_video_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"clip\.mp4' is 12x480; the smallest video that can be used is 16x16"):
        choose(source(width=12), frames=81, area=A480, tokens=T480)


def test_frames_are_scaled_to_cover_and_cut_at_the_centre() -> None:
    frames = torch.zeros(2, 20, 60, 3, dtype=torch.uint8)
    frames[:, :, 20:40] = 255  # the middle third
    fitted = fit(frames, 20, 20)
    assert fitted.shape == (3, 2, 20, 20) and (fitted == 1).all()
    doubled = fit(frames, 40, 40)
    assert doubled.shape == (3, 2, 40, 40) and (doubled[..., 2:-2] == 1).all()
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.allclose(fit(ramp, 16, 16)[0, 0].flatten(), torch.arange(256) / 127.5 - 1)


# Reading --------------------------------------------------------------------------------------------------------------


def greys(clip: Clip) -> list[int]:
    return [round(float((value + 1) * 127.5)) for value in clip.tensor()[0, :, 5, 5]]


def test_the_chosen_frames_are_read_in_pieces_of_one_and_four(film: Film) -> None:
    opened = open_video(film(), "--src_video")
    assert (opened.width, opened.height, opened.frames, opened.fps) == (64, 48, 17, 16.0)
    clip = Clip(source=opened, frames=(0, 2, 3, 9, 9, 16, 16, 16, 16), size=(48, 64))
    assert [tuple(piece.shape) for piece in clip.chunks()] == [(3, 1, 48, 64), (3, 4, 48, 64), (3, 4, 48, 64)]
    assert clip.shape == tuple(clip.tensor().shape)
    assert greys(clip) == [7 * number + 3 for number in clip.frames]
    assert greys(clip) == greys(clip), "a clip can be gone through again"


def test_a_mask_is_its_first_channel_from_0_to_1(film: Film) -> None:
    clip, mask = open_control(film(), film("mask.mkv"), 17, (64, 48))
    assert mask is not None and mask.shape == (1, *clip.shape[1:])
    assert torch.allclose(mask.tensor()[0, :, 0, 0], (torch.arange(17) * 7 + 3) / 255)


@pytest.mark.parametrize(("fps", "expected"), [("24000/1001", 24000 / 1001), ("30000/1001", 30000 / 1001), ("25", 25)])
def test_the_rate_is_the_exact_one(film: Film, fps: str, expected: float) -> None:
    opened = open_video(film(fps=fps), "--src_video")
    assert opened.frames == 17 and abs(opened.fps - expected) < 1e-6


def test_a_turned_video_is_read_upright(film: Film, tmp_path: Path) -> None:
    turned = tmp_path / "phone.mp4"
    plain = [ffmpeg_exe(), "-y", "-loglevel", "error", "-display_rotation", "90", "-i", str(film())]
    subprocess.run([*plain, "-c:v", "mpeg4", str(tmp_path / "flat.mp4")], check=True)
    command = [ffmpeg_exe(), "-y", "-loglevel", "error", "-display_rotation", "90", "-i", str(tmp_path / "flat.mp4")]
    subprocess.run([*command, "-c", "copy", str(turned)], check=True)
    flat, opened = open_video(tmp_path / "flat.mp4", "--src_video"), open_video(turned, "--src_video")
    assert (opened.width, opened.height) == (flat.height, flat.width)
    assert next(Clip(source=opened, frames=(0,), size=(64, 64)).chunks()).shape == (3, 1, 64, 64)


def test_a_gif_and_a_single_picture_are_videos_too(film: Film, tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (32, 16), (level, level, level)) for level in (0, 85, 170, 255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    frames[3].save(tmp_path / "a.png")
    assert open_video(tmp_path / "a.gif", "--src_video").frames == 5
    picture = open_video(tmp_path / "a.png", "--src_mask")
    assert picture.frames == 1 and (Clip(source=picture, frames=(0,), size=(16, 32)).tensor() == 1).all()


def test_a_single_picture_masks_every_frame(film: Film, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (64, 48), 255).save(tmp_path / "mask.png")
    clip, mask = open_control(film(), tmp_path / "mask.png", 17, (64, 48))
    assert mask is not None and mask.shape == (1, 17, *clip.size) and (mask.tensor() == 1).all()


def test_a_file_that_ends_while_it_is_read_is_named(film: Film) -> None:
    opened = open_video(film(), "--src_video")
    clip = Clip(source=opened, frames=(0, 30), size=(48, 64))
    with pytest.raises(BadRequest, match=r"clip\.mkv' ended after 17 of 17 frames"):
        clip.tensor()


# What is refused ------------------------------------------------------------------------------------------------------


def test_files_that_are_no_videos_are_refused_by_name(film: Film, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = film("whole.mkv", frames=33)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[:300])
    sound = tmp_path / "tone.wav"
    subprocess.run(
        [ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=d=0.1", str(sound)], check=True
    )  # fmt: skip
    for name, says in (
        ("nowhere.mp4", "there is no such file"), ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "cannot be read as a video"), ("cut.mkv", "cannot be"), ("tone.wav", "it holds no picture"),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match=rf"^--src_video '.*{name}'.*{says}") as caught:
            open_video(tmp_path / name, "--src_video")
        assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_or_length_is_refused(film: Film) -> None:
    video = film()
    with pytest.raises(BadRequest, match=r"mask\.mkv' is 48x64, --src_video '.*' 64x48: they must be of one size"):
        open_control(video, film("mask.mkv", size=(48, 64)), 17, (64, 48))
    with pytest.raises(BadRequest, match=r"short\.mkv' has 9 frames, --src_video '.*' 17: give one for each"):
        open_control(video, film("short.mkv", frames=9), 17, (64, 48))


# Upstream's class -----------------------------------------------------------------------------------------------------


def processor(**changes: object) -> VaceVideoProcessor:
    plain = {"downsample": (4, 16, 16), "min_area": 48 * 64, "max_area": 48 * 64, "min_fps": 16, "max_fps": 16}
    return VaceVideoProcessor(**(plain | {"zero_start": True, "seq_len": 36, "keep_last": True} | changes))  # type: ignore[arg-type]


def test_upstreams_processor_loads_pairs_of_the_same_frames(film: Film) -> None:
    video, mask, numbers, size, fps = processor().load_video_pair(film(), film("longer.mkv", frames=21))
    assert size == (48, 64) and numbers == list(spread(17, 9)) and fps == pytest.approx(9 / (16.5 / 16))
    assert torch.equal(video, mask) and video.shape == (3, 9, 48, 64)
    area = processor()
    area.set_area(32 * 32)
    area.set_seq_len(4 * 5)
    assert area.load_video(film())[2] == (32, 32), "four blocks make two rows of two"


def test_upstreams_processor_cuts_a_box_out_first(film: Film) -> None:
    video, _, size, _ = processor().load_video(film(), crop_box=(0, 32, 16, 48))
    assert size == (32, 32) and video.shape == (3, 17, 32, 32)
    with pytest.raises(BadRequest, match="keep_last=False"):
        processor(keep_last=False)
