"""The judge is the ruler for everything the demo model is compared on, so it is measured first: on rendered clips."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from demo import scenes  # noqa: E402

from wan.cli.judge import COLORS, MOTIONS, SHAPES, SIZES, SPEEDS, TEXTURES, TONES, judge  # noqa: E402
from wan.engine.errors import BadRequest  # noqa: E402

SEED = 11


def every_word(count: int) -> list[scenes.Scene]:
    """Random scenes that walk through all colours, shapes and motions."""
    rng = random.Random(SEED)
    colors = list(COLORS)
    return [
        scenes.random_scene(rng, (colors[i % len(colors)], SHAPES[i % len(SHAPES)], MOTIONS[i % len(MOTIONS)]))
        for i in range(count)
    ]


def test_judge_reads_every_attribute_of_rendered_clips() -> None:
    shown = every_word(24)
    words = [scene.words() for scene in shown]
    for name, values in (("size", SIZES), ("speed", SPEEDS), ("tone", TONES), ("texture", TEXTURES)):
        assert set(values) <= {scene[name] for scene in words}, name  # the sample has every word
    for scene in shown:
        verdict = judge(scenes.render([scene])[0])
        assert all(verdict.agrees(**scene.words()).values()), (scene, verdict)
        assert verdict.shape_iou > 0.9  # the template of the shape drawn, up to the grid of pixels


def test_judge_withstands_noise_and_blur() -> None:
    generator = torch.Generator().manual_seed(SEED)
    for scene in every_word(6):
        clip = scenes.render([scene])[0]
        blurred = torch.nn.functional.avg_pool3d(clip[None], (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)[0]
        verdict = judge(blurred + 0.05 * torch.randn(clip.shape, generator=generator))
        assert all(verdict.agrees(**scene.words()).values()), (scene, verdict)


def test_judge_follows_the_pixels_not_the_caption() -> None:
    rng = random.Random(SEED)
    clip = scenes.render([scenes.random_scene(rng, ("red", "square", "up-left"))])[0]
    assert judge(clip.flip(1)).motion == "down-right"  # played backwards
    assert judge(clip.flip(0)).color == "blue"  # red and blue exchanged
    growing = scenes.render([scenes.random_scene(rng, ("green", "circle", "grow"))])[0]
    verdict = judge(growing)
    assert (verdict.motion, verdict.size, verdict.speed, verdict.outline_iou) == ("grow", None, None, None)


def test_outlines_that_flicker_score_lower_than_steady_ones() -> None:
    rng = random.Random(SEED)
    scene = scenes.random_scene(rng, ("blue", "circle", "still"))
    steady = scenes.render([scene])[0]
    square = scenes.render([scenes.replace(scene, shape="square")])[0]
    flicker = steady.clone()
    flicker[:, ::2] = square[:, ::2]
    calm, wild = judge(steady).outline_iou, judge(flicker).outline_iou
    assert calm is not None and wild is not None
    assert calm > 0.99 > 0.9 > wild


def test_an_empty_clip_is_no_shape() -> None:
    assert judge(torch.zeros(3, 9, 96, 96)).shape_iou < 0.5


@pytest.mark.parametrize("shape", [(3, 96, 96), (1, 9, 96, 96), (3, 1, 96, 96)])
def test_judge_refuses_what_is_no_clip(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match="video"):
        judge(torch.zeros(shape))


def test_attributes_that_were_not_asked_for_are_not_counted() -> None:
    verdict = judge(scenes.render(every_word(1))[0])
    assert verdict.agrees(color=verdict.color, speed=None) == {"color": True}
