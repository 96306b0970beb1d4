"""Pictures as given frames: files of every kind, sizes, masks and latents value by value."""

from __future__ import annotations

import math
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wan.conditioning.image import (
    ImageInputs,
    area_size,
    framed,
    image_channels,
    known_mask,
    load_image,
    look_at,
    pixels_of,
    resized,
    to_rgb,
)
from wan.engine.errors import BadRequest
from wan.engine.types import Encoders
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAEConfig

RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_halves(size: tuple[int, int] = (6, 4)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_turned_as_its_exif_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_halves((48, 32)).save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    image = load_image(tmp_path / "photo.jpg")
    assert image.size == ((48, 32) if orientation <= 4 else (32, 48))
    width, height = image.size
    corners = {(x, y): image.getpixel((x * (width - 1), y * (height - 1)))[0] > 128 for x in (0, 1) for y in (0, 1)}
    red = {
        1: (0, None), 2: (1, None), 3: (1, None), 4: (0, None), 5: (None, 0), 6: (None, 0), 7: (None, 1), 8: (None, 1),
    }[orientation]  # fmt: skip
    for (x, y), is_red in corners.items():
        assert is_red == (x == red[0] if red[0] is not None else y == red[1])


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.save(tmp_path / "a.png")
    made = load_image(tmp_path / "a.png")
    assert made.mode == "RGB" and [made.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    grey = Image.new("LA", (1, 1), (100, 128))
    grey.save(tmp_path / "la.png")
    assert load_image(tmp_path / "la.png").getpixel((0, 0)) == (177, 177, 177)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=1)
    made = load_image(tmp_path / "p.png")
    assert [made.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


def sixteen_bits(path: Path, values: list[int]) -> Path:
    """A grey PNG of 16 bits, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    row = b"\0" + b"".join(struct.pack(">H", value) for value in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    made = load_image(sixteen_bits(tmp_path / "a.png", [0, 257, 32896, 65535]))
    assert [made.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), (0, 128, 255)),
        (np.array([[0.0, 100.0, 255.0]], np.float32), (0, 100, 255)),
        (np.array([[0, 100, 255]], np.int32), (0, 100, 255)),
        (np.array([[0, 25700, 65535]], np.int32), (0, 100, 255)),
        (np.array([[0, 0, 0]], np.int32), (0, 0, 0)),
        (np.array([[np.nan, 0.0, 1.0]], np.float32), (0, 0, 255)),
    ],
)
def test_grey_values_of_any_range_come_to_eight_bits(values: Any, expected: tuple[int, ...]) -> None:
    made = to_rgb(Image.fromarray(values))
    assert tuple(made.getpixel((x, 0))[0] for x in range(3)) == expected and made.mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    assert to_rgb(Image.new("RGB", (3, 2), (200, 200, 200)).convert(mode)).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"", "no picture that can be read; save it as PNG or JPEG"),
        (b"hello", "no picture that can be read; save it as PNG or JPEG"),
        ("cut", "cannot be read .*; save it again as PNG or JPEG"),
        ("folder", "is a folder; name a picture in it"),
    ],
)
def test_what_is_no_picture_is_refused_naming_flag_and_file(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "x.png"
    if content == "folder":
        path.mkdir()
    elif content == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BadRequest, match=rf"--last_frame '.*x\.png'.*{says}") as caught:
        load_image(path, "--last_frame")
    assert "\n" not in str(caught.value)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "area", "size"),
    [
        ((832, 480), 832 * 480, (832, 464)),  # as upstream: the root falls just short of 480
        ((480, 832), 832 * 480, (480, 832)),
        ((1280, 720), 1280 * 720, (1280, 720)),
        ((720, 1280), 1280 * 720, (720, 1280)),
        ((1000, 1000), 832 * 480, (624, 624)),
        ((4032, 3024), 832 * 480, (720, 544)),
        ((3024, 4032), 1280 * 720, (816, 1104)),
        ((1, 1), 96 * 96, (96, 96)),
    ],
)
def test_size_by_area_is_upstreams(picture: tuple[int, int], area: int, size: tuple[int, int]) -> None:
    assert area_size(*picture, area) == size


def test_size_by_area_never_exceeds_it_and_keeps_the_shape() -> None:
    for width in range(50, 4000, 137):
        for height in range(50, 4000, 151):
            across, down = area_size(width, height, 832 * 480)
            assert across % 16 == down % 16 == 0 and across * down <= 832 * 480
            if 0.25 < width / height < 4:
                assert math.isclose(across / down, width / height, rel_tol=0.1)


def test_sliver_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"30000x10 pixels is too narrow.*--fit crop"):
        area_size(30000, 10, 96 * 96)


@pytest.mark.parametrize(
    ("fit", "size"),
    [("area", (60, 40)), ("stretch", (60, 40)), ("crop", (40, 40)), ("pad", (60, 60))],
)
def test_picture_is_cut_or_padded_to_the_shape_at_its_own_resolution(fit: str, size: tuple[int, int]) -> None:
    landscape = framed(two_halves((60, 40)), 16, 16, fit)
    assert landscape.size == size
    portrait = framed(two_halves((40, 60)), 16, 16, fit)
    assert portrait.size == size[::-1]
    if fit == "pad":
        assert landscape.getpixel((0, 0)) == (0, 0, 0) and landscape.getpixel((0, 30)) == RED
        assert portrait.getpixel((0, 30)) == (0, 0, 0) and portrait.getpixel((10, 30)) == RED
    if fit == "crop":  # at the centre: as much red as blue
        assert landscape.getpixel((19, 0)) == RED and landscape.getpixel((20, 0)) == BLUE


def test_unknown_fit_is_refused() -> None:
    with pytest.raises(BadRequest, match="fit='best' is unknown; use area, crop, pad, stretch"):
        framed(two_halves(), 16, 16, "best")


def test_last_frame_of_another_size_is_resized_to_the_first(tmp_path: Path) -> None:
    inputs = ImageInputs(first=two_halves((60, 40)), last=two_halves((30, 90)))
    first, last = inputs.pictures(32, 16)
    assert first.size == last.size == (60, 40)
    # Its whole width is there, twice as large, and its top and bottom are cut.
    assert last.getpixel((2, 20)) == RED and last.getpixel((57, 20)) == BLUE
    first, last = ImageInputs(first=two_halves((60, 40)), last=two_halves((30, 90)), fit="crop").pictures(32, 16)
    assert first.size == last.size == (60, 30)


def test_pixels_lie_between_minus_one_and_one() -> None:
    pixels = pixels_of(Image.fromarray(np.array([[[0, 51, 255]]], np.uint8)))
    assert pixels.shape == (3, 1, 1) and torch.allclose(pixels.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert pixels.dtype == torch.float32


def test_resizing_is_upstreams_unless_a_fit_is_asked_for() -> None:
    pixels = torch.rand(3, 40, 60)
    plain = torch.nn.functional.interpolate(pixels[None], size=(16, 32), mode="bicubic")[0]
    assert torch.equal(resized(pixels, 32, 16, antialias=False), plain)
    smooth = resized(pixels, 32, 16, antialias=True)
    assert smooth.shape == plain.shape and smooth.std() < plain.std()
    assert resized(pixels, 60, 40, antialias=True) is pixels


# What the model is conditioned on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "num_frames", "expected"),
    [
        ((0,), 1, [[1, 1, 1, 1]]),
        ((0,), 9, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ((0, 8), 9, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]),
        ((0, 4), 5, [[1, 1, 1, 1], [0, 0, 0, 1]]),
        ((5,), 9, [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]),
    ],
)
def test_mask_has_four_video_frames_in_each_latent_frame(
    known: tuple[int, ...], num_frames: int, expected: list[list[int]]
) -> None:
    mask = known_mask(known, num_frames, 2, 3)
    assert mask.shape == (4, len(expected), 2, 3)
    for row in range(2):
        for column in range(3):
            assert mask[:, :, row, column].t().tolist() == expected


def encoders_of(network: Any, name: str) -> Encoders:
    @contextmanager
    def use(asked: str) -> Any:
        assert asked == name
        yield network

    config = SimpleNamespace(vae_stride=(4, 8, 8))
    cpu = torch.device("cpu")
    return Encoders(use=use, where=lambda name: cpu, device=cpu, config=config)


def test_channels_are_the_mask_and_the_latents_of_a_grey_video() -> None:
    vae = WanVAEModel(VAEConfig(encoder_dim=4, decoder_dim=4, num_res_blocks=1)).eval()
    first, last = torch.rand(3, 16, 24) * 2 - 1, torch.rand(3, 16, 24) * 2 - 1
    for frames in ({0: first}, {0: first, 8: last}):
        video = torch.zeros(1, 3, 9, 16, 24)
        for number, frame in frames.items():
            video[0, :, number] = frame
        with torch.inference_mode():
            channels = image_channels(encoders_of(vae, "vae"), frames, 9)
            latents = vae.encode(video)
        assert channels.shape == (1, 20, 3, 2, 3) and channels.dtype == torch.float32
        assert torch.equal(channels[0, :4], known_mask(list(frames), 9, 2, 3))
        assert torch.equal(channels[:, 4:], latents)


def test_clip_sees_each_picture_and_its_tokens_stand_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def visual(video: Tensor) -> Tensor:
        seen.append(video)
        return torch.full((1, 5, 2), float(len(seen)))

    monkeypatch.setattr(
        "wan.conditioning.image.look", lambda tower, videos: torch.cat([tower(video) for video in videos])
    )
    tokens = look_at(encoders_of(SimpleNamespace(visual=visual), "clip"), [torch.zeros(3, 4, 6), torch.ones(3, 4, 6)])
    assert [tuple(video.shape) for video in seen] == [(3, 1, 4, 6)] * 2
    assert tokens.shape == (1, 10, 2) and tokens[0, :, 0].tolist() == [1.0] * 5 + [2.0] * 5
