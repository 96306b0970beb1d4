"""Each correction of guidance is its paper's formula, here derived a second way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wan.engine.sampling.corrections import AdaptiveProjection, frequency_scaled, rescaled, zero_star

SHAPE = (2, 4, 3, 8, 6)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)


def test_zero_star_leaves_the_least_possible_distance_to_cond(pair: tuple[Tensor, Tensor]) -> None:
    """<c, u> / |u|^2 is the least-squares factor: numpy's solver finds the same, for each sample alone."""
    cond, uncond = pair
    fitted = zero_star(cond, uncond)
    for c, u, found in zip(cond, uncond, fitted, strict=True):
        factor = np.linalg.lstsq(u.reshape(-1, 1).numpy(), c.reshape(-1).numpy(), rcond=None)[0][0]
        torch.testing.assert_close(found, factor * u, rtol=1e-7, atol=1e-9)


def test_rescaling_in_full_restores_the_spread_of_cond_and_by_zero_changes_nothing(pair: tuple[Tensor, Tensor]) -> None:
    cond, _ = pair
    guided = 5 * cond
    assert torch.equal(rescaled(guided, cond, 0.0), guided)
    torch.testing.assert_close(rescaled(guided, cond, 1.0), cond, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rescaled(guided, cond, 0.5), 3 * cond, rtol=1e-6, atol=1e-6)


def test_scaling_frequencies_scales_single_waves_by_their_own_factor() -> None:
    y = torch.arange(64, dtype=torch.float64) / 64
    coarse = torch.cos(2 * torch.pi * 3 * y)[:, None].expand(1, 1, 1, 64, 64)
    fine = torch.cos(2 * torch.pi * 25 * y)[:, None].expand(1, 1, 1, 64, 64)
    uncond = torch.randn(1, 1, 1, 64, 64, dtype=torch.float64)
    changed = frequency_scaled(uncond + coarse + fine, uncond, low=0.5, high=2.0, cutoff=20)
    torch.testing.assert_close(changed, uncond + 0.5 * coarse + 2.0 * fine, rtol=1e-5, atol=1e-5)


def test_a_cutoff_beyond_the_picture_makes_everything_low(pair: tuple[Tensor, Tensor]) -> None:
    cond, uncond = pair
    changed = frequency_scaled(cond, uncond, low=1.0, high=9.0, cutoff=20)
    torch.testing.assert_close(changed, cond, rtol=1e-5, atol=1e-5)


def test_projection_follows_what_is_orthogonal_to_cond(pair: tuple[Tensor, Tensor]) -> None:
    cond, uncond = pair
    step = cond - AdaptiveProjection(momentum=0.0, limit=1e9, parallel=0.0)(cond, uncond)
    for c, u, found in zip(cond, uncond, step, strict=True):
        assert abs(torch.dot(found.flatten(), c.flatten())) < 1e-5 * c.norm() * found.norm()
        q, _ = torch.linalg.qr(c.reshape(-1, 1))
        torch.testing.assert_close(found.flatten(), (c - u).flatten() - (q @ (q.T @ (c - u).reshape(-1, 1)))[:, 0])


def test_projection_keeping_everything_is_plain_guidance(pair: tuple[Tensor, Tensor]) -> None:
    cond, uncond = pair
    torch.testing.assert_close(AdaptiveProjection(0.0, 1e9, 1.0)(cond, uncond), uncond)


def test_projection_limits_the_difference_and_remembers_earlier_ones(pair: tuple[Tensor, Tensor]) -> None:
    cond, uncond = pair
    short = cond - AdaptiveProjection(0.0, 2.0, 1.0)(cond, uncond)
    torch.testing.assert_close(short.flatten(1).norm(dim=1), torch.full((2,), 2.0, dtype=torch.float64))
    remembering = AdaptiveProjection(-0.75, 1e9, 1.0)
    remembering(cond, uncond)
    torch.testing.assert_close(cond - remembering(cond, uncond), 0.25 * (cond - uncond))
