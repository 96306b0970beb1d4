"""Figures of likeness are those of their definitions, computed here in another way."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wan.cli.benchmarking import quality


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips [2, 20, 24, 3] of 8 bits that differ by up to 30 levels."""
    frames = torch.randint(40, 200, (2, 20, 24, 3), dtype=torch.uint8)
    return frames, (frames.int() + torch.randint(-30, 31, frames.shape)).to(torch.uint8)


def test_ssim_is_what_its_definition_gives_window_by_window(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Weighted means, variances and covariance of every 11x11 window by numpy, after the paper's equation 13."""
    a, b = (quality.luma(clip[0].float()).double().numpy() for clip in pair)
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            variance_p, variance_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 6.5025) * (2 * covariance + 58.5225)
            values.append(top / ((mean_p**2 + mean_q**2 + 6.5025) * (variance_p + variance_q + 58.5225)))
    assert quality.ssim(torch.tensor(a), torch.tensor(b)) == pytest.approx(float(np.mean(values)), abs=1e-9)


def test_differences_and_psnr_are_those_of_all_levels(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    found, missing = quality.compare(*pair)
    difference = pair[0].numpy().astype(float) - pair[1].numpy().astype(float)
    assert found["frames_max"] == np.abs(difference).max()
    assert found["frames_mean"] == pytest.approx(np.abs(difference).mean())
    assert found["psnr_db"] == pytest.approx(10 * math.log10(255**2 / (difference**2).mean()))
    assert "lpips" in missing and "lpips" not in found


def test_equal_frames_have_no_psnr_and_other_shapes_no_figures(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    found, missing = quality.compare(pair[0], pair[0])
    assert (
        found["ssim"] == pytest.approx(1) and found["frames_max"] == 0 and missing["psnr_db"] == "the frames are equal"
    )
    found, missing = quality.compare(pair[0], pair[1][:1])
    assert not found and "(1, 20, 24, 3)" in missing["ssim"]


def test_lpips_is_asked_only_where_its_network_lies(
    pair: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames go to it one by one, channels first, in -1..1; without weights nothing is fetched."""
    shapes: list[Any] = []

    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(a.shape))
        assert float(a.min()) >= -1 and float(a.max()) <= 1
        return (a - b).abs().max()

    spec = SimpleNamespace(LPIPS=lambda net, verbose: model, __spec__=SimpleNamespace(name="lpips"))
    monkeypatch.setitem(sys.modules, "lpips", spec)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "alexnet" in quality.compare(*pair)[1]["lpips"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    found, missing = quality.compare(*pair)
    assert not missing and shapes == [(1, 3, 20, 24)] * 2 and 0 < found["lpips"] <= 60 / 255 + 1e-6
