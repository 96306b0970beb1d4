"""Pictures for a language model: upright, without transparency, not larger than asked for."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from wan.engine.errors import BadRequest
from wan.prompting.pictures import data_url, read_pictures


def test_a_large_picture_shrinks_to_the_area_and_keeps_its_shape() -> None:
    (picture,) = read_pictures(Image.new("RGB", (1600, 800)), 512 * 512)
    assert picture.width * picture.height <= 512 * 512
    assert picture.width / picture.height == pytest.approx(2, abs=0.02)
    assert picture.width > 700
    assert read_pictures(Image.new("RGB", (64, 48)), 512 * 512)[0].size == (64, 48)


def test_a_line_of_pixels_stays_one() -> None:
    assert read_pictures(Image.new("RGB", (100_000, 1)), 400)[0].size == (400, 1)


def test_a_turned_photograph_stands_upright_and_what_is_transparent_is_white(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (8, 8), 65535 // 5).save(tmp_path / "deep.png")
    moving = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving[0].save(tmp_path / "moving.gif", save_all=True, append_images=moving[1:])
    names = ("turned.jpg", "clear.png", "deep.png", "moving.gif")
    first, second, third, fourth = read_pictures([tmp_path / name for name in names], 999)
    assert first.size == (20, 40)
    assert second.getpixel((4, 4)) == (255, 255, 255)
    assert [each.mode for each in (first, second, third, fourth)] == ["RGB"] * 4
    assert third.getpixel((0, 0)) == (51, 51, 51)
    assert fourth.getpixel((0, 0)) == (255, 0, 0)


def test_none_is_no_picture_and_what_is_none_is_named(tmp_path: Path) -> None:
    assert read_pictures(None, 100) == []
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(BadRequest, match=r"picture '.*notes\.png' is no picture that can be read"):
        read_pictures(tmp_path / "notes.png", 100)
    with pytest.raises(BadRequest, match=r"picture '.*absent\.png': there is no such file"):
        read_pictures([str(tmp_path / "absent.png")], 100)


def test_a_picture_can_be_sent_as_text() -> None:
    head, _, body = data_url(Image.new("RGB", (3, 2), "blue")).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).getpixel((2, 1)) == (0, 0, 255)
