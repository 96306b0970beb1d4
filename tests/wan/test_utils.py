"""Upstream's helpers: same names, same signatures, same pixels; but a failed save is an error."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
import torch

import wan.utils
from wan.engine.errors import BadRequest, OutputError
from wan.utils import utils
from wan.video import verify_video

VIDEO = {"save_file": None, "fps": 30, "suffix": ".mp4", "nrow": 8, "normalize": True, "value_range": (-1, 1)}
IMAGE = {"nrow": 8, "normalize": True, "value_range": (-1, 1)}


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("save_video", VIDEO),
        ("cache_video", VIDEO | {"retry": 5}),
        ("save_image", IMAGE),
        ("cache_image", IMAGE | {"retry": 5}),
        ("rand_name", {"length": 8, "suffix": ""}),
        ("masks_like", {"zero": False, "generator": None, "p": 0.2}),
        ("best_output_size", {}),
        ("str2bool", {}),
    ],
)
def test_signatures_are_upstreams(name: str, defaults: dict[str, object]) -> None:
    parameters = inspect.signature(getattr(utils, name)).parameters
    found = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {key: found[key] for key in defaults} == defaults
    assert set(found) - set(defaults) <= {"crf"}


@pytest.mark.parametrize("word", ["yes", "True", "T", "y", "1", True])
def test_true_words(word: str | bool) -> None:
    assert utils.str2bool(word) is True


@pytest.mark.parametrize("word", ["no", "FALSE", "f", "n", "0", False])
def test_false_words(word: str | bool) -> None:
    assert utils.str2bool(word) is False


def test_other_words_are_an_argparse_error() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe'"):
        utils.str2bool("maybe")


def test_rand_name() -> None:
    assert len(utils.rand_name()) == 16
    assert utils.rand_name(4, "mp4").endswith(".mp4") and len(utils.rand_name(4, ".mp4")) == 12
    assert utils.rand_name() != utils.rand_name()


@pytest.mark.parametrize("write", [utils.save_video, utils.cache_video])
def test_videos_are_written_and_the_path_is_returned(tmp_path: Path, write: object) -> None:
    video = torch.linspace(-1.2, 1.2, 3 * 5 * 16 * 32).view(1, 3, 5, 16, 32)
    path = write(video, save_file=str(tmp_path / "clip.mp4"), fps=16, nrow=1, normalize=True, value_range=(-1, 1))
    assert path == str(tmp_path / "clip.mp4")
    assert verify_video(path) == (5, 32, 16, 16.0)


def test_video_without_a_name_goes_to_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.tempfile, "tempdir", str(tmp_path))
    path = Path(utils.save_video(torch.zeros(1, 3, 2, 16, 16)))
    assert path.parent == tmp_path and path.suffix == ".mp4" and path.is_file()


def test_several_videos_become_a_grid(tmp_path: Path) -> None:
    path = utils.save_video(torch.zeros(3, 3, 2, 16, 32), tmp_path / "grid.mp4", nrow=2)
    assert verify_video(path)[:3] == (2, 2 * (32 + 2) + 2, 2 * (16 + 2) + 2)


def test_grid_places_images_like_torchvision() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 6) / 2
    grid = utils._grid(images, 2, True, (0, 1))
    assert grid.shape == (3, 14, 18)
    assert grid[0, 2:6, 2:8].unique().tolist() == [0] and grid[0, 2:6, 10:16].unique().tolist() == [0.5]
    assert grid[0, 8:12, 2:8].unique().tolist() == [1] and grid[0, 8:12, 10:16].unique().tolist() == [0]
    assert torch.equal(utils._grid(images[:1], 8, False, (0, 1)), images[0])


@pytest.mark.parametrize("write", [utils.save_image, utils.cache_image])
def test_images_are_rounded(tmp_path: Path, write: object) -> None:
    from PIL import Image

    levels = torch.arange(0, 256, dtype=torch.float32).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    path = write(levels / 255 * 2 - 1, str(tmp_path / "picture"))
    assert path == str(tmp_path / "picture.png")
    with Image.open(path) as image:
        assert list(image.getchannel(0).tobytes()) == list(range(256))


def test_a_failed_save_is_an_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(OutputError, match="clip.mp4"):
        utils.save_video(torch.zeros(1, 3, 2, 16, 16), gone / "clip.mp4")
    with pytest.raises(OutputError, match="picture.png"):
        utils.cache_image(torch.zeros(1, 3, 16, 16), gone / "picture.png")


@pytest.mark.parametrize(
    ("given", "size"),
    [((1280, 720, 32, 32, 704 * 1280), (1248, 704)), ((720, 1280, 32, 32, 704 * 1280), (704, 1248)),
     ((1000, 1000, 32, 32, 704 * 1280), (960, 928)), ((1920, 1080, 16, 16, 480 * 832), (832, 480))],
)  # fmt: skip
def test_best_output_size(given: tuple[int, ...], size: tuple[int, int]) -> None:
    assert utils.best_output_size(*given) == size


def test_best_output_size_is_legal_for_any_shape() -> None:
    for w in range(100, 2000, 171):
        for h in range(100, 2000, 133):
            width, height = utils.best_output_size(w, h, 32, 32, 704 * 1280)
            assert width % 32 == 0 and height % 32 == 0 and 0 < width * height <= 704 * 1280
    with pytest.raises(BadRequest, match="no 32x32 grid"):
        utils.best_output_size(100, 100, 32, 32, 500)


def test_masks_are_zero_in_the_first_latent_frame() -> None:
    latents = [torch.randn(4, 3, 2, 2), torch.randn(4, 1, 2, 2)]
    for masks in utils.masks_like(latents):
        assert all(torch.equal(mask, torch.ones_like(item)) for mask, item in zip(masks, latents, strict=True))
    for masks in utils.masks_like(latents, zero=True):
        for mask in masks:
            assert not mask[:, 0].any() and mask[:, 1:].all()
    levels, masks = utils.masks_like(latents, zero=True, generator=torch.Generator().manual_seed(0), p=1.0)
    assert 0 < levels[0][0, 0, 0, 0] < 0.3 and not masks[0][:, 0].any()


def test_every_exported_name_can_be_imported() -> None:
    for name in wan.utils.__all__:
        assert getattr(wan.utils, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = wan.utils.nothing
