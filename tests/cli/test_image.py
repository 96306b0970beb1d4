"""Text to image: one frame, a .png under upstream's name or the user's, with its record in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wan.cli.generate import main
from wan.configs import WAN_CONFIGS
from wan.video import read_metadata


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def image(tiny_checkpoint: Path, tiny_config: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that make one image with one expert, as t2i-14B has it."""
    folder = tmp_path_factory.mktemp("t2i") / "Tiny-T2I-14B"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        if not path.name.endswith("_noise_model"):
            (folder / path.name).symlink_to(path)
    for path in (tiny_checkpoint / "low_noise_model").iterdir():
        (folder / path.name).symlink_to(path)
    config = type(tiny_config)(WAN_CONFIGS["t2i-14B"])
    same = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_len", "param_dtype", "t5_dtype")
    config.update({name: tiny_config[name] for name in same}, sample_neg_prompt="blurry")
    monkeypatch.setitem(WAN_CONFIGS, "t2i-14B", config)
    task = ["--task", "t2i-14B", "--ckpt_dir", str(folder), "--device", "cpu", "--seed", "1"]
    return [*task, "--sample_steps", "2", "--size", "48x32", "--any_size", "--prompt", "a lighthouse / at dusk"]


def pixels(path: Path, kind: str = "PNG") -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode, picture.size) == (kind, "RGB", (48, 32))
        return np.asarray(picture)


def test_the_image_has_upstreams_name_and_its_record(image: list[str], capsys: Any) -> None:
    assert main(image) == 0
    out, err = capsys.readouterr()
    (path,) = Path().glob("*.png")
    assert out == f"{path}\n" and "one image" in err
    assert re.fullmatch(r"t2i-14B_48x32_1_1_a_lighthouse___at_dusk_\d{8}_\d{6}\.png", path.name), path.name
    assert pixels(path).std() > 1
    inside = read_metadata(path)
    made = json.loads(inside["comment"])
    assert inside["title"] == made["flags"]["prompt"] == "a lighthouse / at dusk"
    assert made["flags"]["task"] == "t2i-14B" and made["flags"]["frame_num"] == 1
    beside = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert beside["flags"] == made["flags"] and beside["result"]["video"]["frames"] == 1


def test_the_image_is_repeated_from_its_record_bit_by_bit(image: list[str], capsys: Any) -> None:
    assert main([*image, "--save_file", "first.png"]) == 0
    assert main(["--from", "first.png", "--device", "cpu", "--save_file", "again.png"]) == 0
    assert "the same bits can be expected" in capsys.readouterr().err
    assert (pixels(Path("first.png")) == pixels(Path("again.png"))).all()
    assert main(["--from", "first.png", "--device", "cpu", "--save_file", "other.png", "--seed", "2"]) == 0
    assert (pixels(Path("first.png")) != pixels(Path("other.png"))).any()


def test_other_image_formats_are_repeated_from_their_records(image: list[str]) -> None:
    for ending, kind in (("jpg", "JPEG"), ("webp", "WEBP")):
        assert main([*image, "--save_file", f"first.{ending}"]) == 0
        assert main(["--from", f"first.{ending}", "--device", "cpu", "--save_file", f"again.{ending}"]) == 0
        first, again = (pixels(Path(f"{name}.{ending}"), kind) for name in ("first", "again"))
        assert first.std() > 1 and (first == again).all()


def test_the_users_own_names_work_for_images(image: list[str]) -> None:
    named = [*image, "--name", "{task}/{prompt:12}-{seed:4}-{frames}", "--no_metadata"]
    for _ in range(2):
        assert main([*named, "--save_file", "out/"]) == 0
    assert sorted(path.as_posix() for path in Path("out").rglob("*.*")) == [
        "out/t2i-14B/a_lighthouse-0001-1-2.png", "out/t2i-14B/a_lighthouse-0001-1.png"
    ]  # fmt: skip
    assert read_metadata(Path("out/t2i-14B/a_lighthouse-0001-1.png")) == {}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--frame_num", "5"], "--frame_num: t2i-14B makes one image, so the frame count must be 1"),
        (["--duration", "2"], "--duration 2 at .* t2i-14B makes one image"),
        (["--save_file", "picture.gif"], r"'picture\.gif'"),
        (["--save_file", "picture.webm"], r"'picture\.webm'"),
        (["--size", "47x32"], "48x32"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_loaded(
    image: list[str], flags: list[str], says: str, capsys: Any
) -> None:
    given = image if "--size" not in flags else [word for word in image if word not in ("--size", "48x32")]
    assert main([*given, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", err), err
    assert list(Path().iterdir()) == []
