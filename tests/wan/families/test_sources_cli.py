"""`generate.py` with the inputs of ti2v and VACE: what it makes, what it records, what it refuses before a weight."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import wan
from wan.cli.generate import main
from wan.configs import WAN_CONFIGS
from wan.video import verify_video
from wan.video.ffmpeg import ffmpeg_exe


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources that go together, clip.mkv, mask.mkv, ref.png, still.png, and some that do not."""
    folder = tmp_path_factory.mktemp("sources")
    film(folder / "clip.mkv")
    film(folder / "mask.mkv")
    film(folder / "one.mkv", frames=1)
    film(folder / "portrait.mkv", frames=15, width=32, height=48)
    film(folder / "short.mkv", frames=5)
    film(folder / "thin.mkv", height=8)
    pixels = (torch.rand(40, 24, 3) * 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "ref.png")
    Image.new("L", (48, 32), 255).save(folder / "still.png")
    Image.new("RGB", (4000, 1)).save(folder / "line.png")
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own that holds the sources."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return tmp_path


def film(path: Path, frames: int = 9, width: int = 48, height: int = 32) -> None:
    pixels = (torch.rand(frames, height, width, 3) * 255).to(torch.uint8)
    command = [ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", "16"]
    command += ["-s", f"{width}x{height}", "-i", "-", "-c:v", "ffv1", "-pix_fmt", "bgr0", str(path)]
    subprocess.run(command, input=pixels.numpy().tobytes(), check=True)


def tiny(task: str, folder: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(WAN_CONFIGS, task, config)
    argv = ["--task", task, "--ckpt_dir", str(folder), "--sample_steps", "2", "--any_size", "--seed", "1"]
    return [*argv, "--device", "cpu", "--save_file", "out.mp4"]


@pytest.fixture
def ti2v(ti2v_checkpoint: Path, small_config: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return tiny("ti2v-5B", ti2v_checkpoint, small_config("ti2v-5B"), monkeypatch)


@pytest.fixture
def vace(vace_checkpoint: Path, small_config: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    argv = tiny("vace-1.3B", vace_checkpoint, small_config("vace-1.3B"), monkeypatch)
    return [*argv, "--size", "48*32", "--frame_num", "9"]


def made() -> tuple[str, int, float]:
    found = verify_video("out.mp4")
    return f"{found.width}x{found.height}", found.frames, found.fps


def flags() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(Path("out.mp4.json").read_text())["flags"]
    return recorded


# ti2v -----------------------------------------------------------------------------------------------------------------


def test_ti2v_makes_video_from_a_text(ti2v: list[str]) -> None:
    assert main([*ti2v, "--size", "64*32", "--frame_num", "5"]) == 0
    assert made() == ("64x32", 5, 24)


@pytest.mark.slow
def test_optimised_program_makes_them_too(
    ti2v: list[str], vace: list[str], programs_agree: Callable[[list[str]], None]
) -> None:
    programs_agree([*ti2v, "--size", "64*32", "--frame_num", "5", "--image", "ref.png"])
    programs_agree([*vace, "--src_ref_images", "ref.png"])


def test_ti2v_makes_video_from_a_picture_in_its_shape(ti2v: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ti2v, "--size", "96*64", "--frame_num", "5", "--image", "ref.png"]) == 0
    assert made() == ("64x96", 5, 24)
    assert "video   64x96 (the 24x40 picture's shape, of 96x64 pixels)" in capsys.readouterr().err
    assert flags()["image"] == str(Path("ref.png").absolute()) and flags()["size"] == "96*64"
    first = Path("out.mp4").read_bytes()
    assert main(["--from", "out.mp4", "--save_file", "again.mp4", "--device", "cpu"]) == 0
    assert verify_video("again.mp4") == verify_video("out.mp4") and len(first) > 0


def test_ti2vs_class_gets_upstreams_arguments(
    ti2v: list[str], monkeypatch: pytest.MonkeyPatch, small_config: Callable[[str], Any]
) -> None:
    calls: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, **arguments: Any) -> None: ...

        def generate(self, prompt: str, **arguments: Any) -> torch.Tensor:
            calls.append(arguments)
            return torch.zeros(3, arguments["frame_num"], 64, 64)

    monkeypatch.setitem(vars(wan), "WanTI2V", Recorder)
    for image in ([], ["--image", "still.png"]):
        assert main([*ti2v, "--size", "64*64", "--frame_num", "5", *image]) == 0
    assert calls[0]["img"] is None and isinstance(calls[1]["img"], Image.Image)
    for call in calls:
        assert (call["size"], call["max_area"], call["frame_num"]) == ((64, 64), 64 * 64, 5)
        assert (call["shift"], call["sampling_steps"], call["guide_scale"], call["seed"]) == (5.0, 2, 5.0, 1)


# VACE -----------------------------------------------------------------------------------------------------------------

SOURCES = {
    "text": [],
    "reference": ["--src_ref_images", "ref.png"],
    "two references": ["--src_ref_images", "ref.png, still.png"],
    "control": ["--src_video", "clip.mkv"],
    "inpainting": ["--src_video", "clip.mkv", "--src_mask", "mask.mkv"],
    "one mask for all": ["--src_video", "clip.mkv", "--src_mask", "still.png"],
    "all": ["--src_video", "clip.mkv", "--src_mask", "mask.mkv", "--src_ref_images", "ref.png"],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_vace_makes_a_video_of_every_kind_of_source(vace: list[str], kind: str) -> None:
    assert main([*vace, *SOURCES[kind]]) == 0
    assert made() == ("48x32", 9, 16)


def test_size_and_length_follow_the_video_and_the_reason_is_told(
    vace: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*vace, "--src_video", "portrait.mkv"]) == 0
    assert made() == ("32x48", 9, 16)
    err = capsys.readouterr().err
    assert "32x48 (the shape of --src_video, 32x48, of 48x32 pixels at most)" in err
    assert "9 frames (of 15 in --src_video, 0.9 s)" in err
    assert flags()["size"] == "48*32" and flags()["frame_num"] == 9
    assert flags()["src_video"] == str(Path("portrait.mkv").absolute())


def test_a_vace_video_is_repeated_from_its_record(vace: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*vace, *SOURCES["inpainting"], "--src_ref_images", "ref.png,still.png", "--context_scale", "0.5"]
    assert main(argv) == 0
    recorded = flags()
    assert recorded["context_scale"] == 0.5
    assert recorded["src_ref_images"] == ",".join(str(Path(name).absolute()) for name in ("ref.png", "still.png"))
    capsys.readouterr()
    assert main(["--from", "out.mp4", "--save_file", "again.mp4", "--device", "cpu"]) == 0
    assert "the same bits can be expected" in capsys.readouterr().err
    film(Path("clip.mkv"))
    assert main(["--from", "out.mp4", "--save_file", "other.mp4", "--device", "cpu"]) == 0
    err = capsys.readouterr().err
    assert "--src_video is another file now" in err and "this makes another video" in err


def test_context_scale_changes_the_video(vace: list[str]) -> None:
    stem = [*vace[: vace.index("--save_file")], "--size", "48*32", "--frame_num", "1", "--save_file"]
    for name, scale in (("a.png", "1"), ("b.png", "1"), ("c.png", "0.2")):
        assert main([*stem, name, "--no_metadata", "--src_video", "one.mkv", "--context_scale", scale]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_a_vace_class_of_upstreams_signature_gets_what_upstreams_program_gives_it(
    vace: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class WanVace:
        device = "cpu"

        def __init__(self, **arguments: Any) -> None: ...

        def prepare_source(self, src_video, src_mask, src_ref_images, num_frames, image_size, device):  # type: ignore[no-untyped-def]
            calls.append(("prepare", (src_video, src_mask, src_ref_images, num_frames, image_size, device), {}))
            return ["frames"], ["mask"], ["refs"]

        def generate(self, input_prompt: str, **arguments: Any) -> torch.Tensor:
            calls.append(("generate", (), arguments))
            return torch.zeros(3, 9, 32, 48)

    monkeypatch.setitem(vars(wan), "WanVace", WanVace)
    assert main([*vace, *SOURCES["control"]]) == 0
    assert calls[0][1] == (["clip.mkv"], [None], [None], 9, (48, 32), "cpu")
    given = calls[1][2]
    assert (given["input_frames"], given["input_masks"], given["input_ref_images"]) == (["frames"], ["mask"], ["refs"])
    assert (given["size"], given["frame_num"], given["shift"], given["guide_scale"]) == ((48, 32), 9, 16.0, 5.0)


def test_a_queue_takes_other_sources_line_by_line(vace: list[str]) -> None:
    lines = [{"prompt": "a", "src_video": "clip.mkv"}, {"prompt": "b", "src_ref_images": "ref.png"}]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    queue = [*vace[: vace.index("--save_file")], "--size", "48*32", "--frame_num", "9", "--save_file", "made/"]
    assert main([*queue, "--prompt_file", "jobs.jsonl"]) == 0
    assert len(list(Path("made").glob("*.mp4"))) == 2


# What is refused ------------------------------------------------------------------------------------------------------

DUMMY = {
    "vace": ["--task", "vace-1.3B", "--load_format", "dummy", "--device", "cpu"],
    "ti2v": ["--task", "ti2v-5B", "--load_format", "dummy", "--device", "cpu"],
}
REFUSED = [
    ("vace", ["--src_video", "nowhere.mp4"], r"--src_video 'nowhere\.mp4': there is no such file"),
    ("vace", ["--src_video", "text.mp4"], r"--src_video '.*text\.mp4' cannot be read as a video"),
    ("vace", ["--src_video", "."], r"--src_video '\.': there is no such file"),
    ("vace", ["--src_video", "clip.mkv", "--src_mask", "gone.mkv"], r"--src_mask 'gone\.mkv': there is no such file"),
    ("vace", ["--src_mask", "mask.mkv"], r"--src_mask 'mask\.mkv' needs a video to lie on: pass --src_video"),
    (
        "vace",
        ["--src_video", "clip.mkv", "--src_mask", "portrait.mkv"],
        r"portrait\.mkv' is 32x48, --src_video .* of one size",
    ),
    (
        "vace",
        ["--src_video", "clip.mkv", "--src_mask", "short.mkv"],
        r"short\.mkv' has 5 frames, --src_video .* 9: give",
    ),
    ("vace", ["--src_video", "thin.mkv"], r"thin\.mkv' is 48x8; the smallest video that can be used is 16x16"),
    ("vace", ["--src_ref_images", "ref.png,gone.png"], r"--src_ref_images 'gone\.png': there is no such file"),
    ("vace", ["--src_ref_images", "ref.png,,still.png"], r"between two commas a file is missing"),
    ("vace", ["--src_ref_images", "text.mp4"], r"--src_ref_images 'text\.mp4' is no picture that can be read"),
    ("vace", ["--context_scale", "nan"], r"--context_scale nan: give a number"),
    ("vace", ["--image", "ref.png"], r"--image: vace-1\.3B has no use for it \(it takes --src_video.*"),
    ("vace", ["--frame_num", "8"], r"8 frames.*4n\+1"),
    ("vace", ["--size", "720p"], r"--size '720p'.*vace-1\.3B was trained on 480\*832, 832\*480"),
    ("ti2v", ["--image", "nowhere.png"], r"--image 'nowhere\.png': there is no such file"),
    ("ti2v", ["--image", "text.mp4"], r"--image 'text\.mp4' is no picture that can be read"),
    ("ti2v", ["--src_video", "clip.mkv"], r"--src_video: ti2v-5B has no use for it \(it takes --image\)"),
    ("ti2v", ["--size", "720p"], r"--size '720p'.*ti2v-5B was trained on 704\*1280, 1280\*704"),
    ("ti2v", ["--size", "1280*720", "--any_size"], r"multiples of 32; the nearest is 1280x704"),
    ("ti2v", ["--image", "line.png"], r"no 32x32 grid fits a 4000x1 picture"),
]


@pytest.mark.parametrize(
    ("kind", "argv", "says"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_sources_end_with_status_2_and_one_line_before_anything_is_loaded(
    kind: str, argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WanVace", "WanTI2V"):
        monkeypatch.setitem(vars(wan), name, None)  # what is not there cannot be built
    assert main([*DUMMY[kind], *argv, "--save_file", "out.mp4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]*\n", err) and re.search(says, err), err
    assert not Path("out.mp4").exists()
