"""Colours of clips are measured as they are, and matching ends a drift that is there without it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from wan.engine.types import Keeper
from wan.video.color import ClipColors
from wan.video.files import to_pixels

FRAMES, SIDE, DRIFT = 8, 16, 6.0


class Frames:
    """A writer that keeps everything as 8 bits."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def write(self, frames: Tensor) -> None:
        self.write_pixels(to_pixels(frames))

    def write_pixels(self, pixels: Tensor) -> None:
        self.kept.append(pixels)

    def restart(self) -> None:
        self.kept.clear()

    def close(self) -> None: ...

    @property
    def clips(self) -> Tensor:
        """[clips, frames, H, W, 3]"""
        return torch.cat(self.kept).unflatten(0, (-1, FRAMES)).double()


def drifting(count: int = 5) -> list[Tensor]:
    """Clips [3, n, H, W] of one scene; each is brighter than the one before, redder and of less contrast."""
    scene = torch.rand(3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.9
    shift = torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1, 1) * DRIFT / 127.5
    return [scene * 0.95**clip + clip * shift for clip in range(count)]


def written(match: bool) -> tuple[Tensor, ClipColors]:
    out = Frames()
    colors = ClipColors(out, match=match)
    keeper = colors.marking(cast("Keeper", _Nothing()))
    for index, clip in enumerate(drifting()):
        keeper.finished(index)
        for chunk in clip.split(3, dim=1):
            colors.write(chunk)
    colors.close()
    return out.clips, colors


class _Nothing:
    def finished(self, shot: int) -> None:
        return None


def test_a_chain_of_clips_drifts_without_matching_and_keeps_the_first_ones_colours_with_it() -> None:
    plain, _ = written(match=False)
    held, _ = written(match=True)
    drift = [(clips[-1].mean((0, 1, 2)) - clips[0].mean((0, 1, 2))).abs().max() for clips in (plain, held)]
    contrast = [clips[-1].std((0, 1, 2)) / clips[0].std((0, 1, 2)) for clips in (plain, held)]
    assert drift[0] > 3 * DRIFT and contrast[0].max() < 0.9
    assert drift[1] < 1.5 and (contrast[1] - 1).abs().max() < 0.03
    assert torch.equal(held[0], plain[0])


def test_what_is_told_of_each_clip_is_what_its_pixels_are() -> None:
    clips, colors = written(match=False)
    told = colors.told()
    assert [clip["first_frame"] for clip in told] == [0, 8, 16, 24, 32]
    for clip, entry in zip(clips, told, strict=True):
        seen = clip[::4, ::4, ::4].reshape(-1, 3)
        assert entry["mean_rgb"] == pytest.approx(seen.mean(0).tolist(), abs=1e-2)
        assert entry["deviation_rgb"] == pytest.approx(seen.std(0, correction=0).tolist(), abs=1e-2)


def test_a_decode_that_begins_anew_is_measured_once() -> None:
    out: Any = Frames()
    colors = ClipColors(out)
    colors.begin(0)
    colors.write(torch.ones(3, 4, SIDE, SIDE))
    colors.restart()
    colors.write(-torch.ones(3, 4, SIDE, SIDE))
    assert [clip["mean_rgb"] for clip in colors.told()] == [[0, 0, 0]] and len(out.kept) == 1
