"""Rotary tables and rotation against complex arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan.engine.ops.rope import bands, grid_table, places_table, rotate


def multiplier(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """Complex128 [L, 1, D / 2], written out token by token."""
    rows = []
    for position in ((f, h, w) for f in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])):
        angles = [
            place * 10000 ** (-2 * pair / width)
            for place, width in zip(position, bands(head_dim), strict=True)
            for pair in range(width // 2)
        ]
        rows.append(angles)
    angle = torch.tensor(rows, dtype=torch.float64)[:, None]
    return torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("head_dim", [24, 32, 128])
def test_rotation_equals_complex_product_in_float64(head_dim: int) -> None:
    grid = (3, 4, 5)
    x = torch.randn(2, 60, 2, head_dim)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * multiplier(grid, head_dim)).flatten(-2)
    # float32 cosine times float32 value: a few units in the last place.
    torch.testing.assert_close(rotate(x, grid_table(grid, head_dim)).double(), expected, rtol=0, atol=1e-6)


def test_places_before_the_first_frame_turn_the_other_way() -> None:
    later, earlier = (places_table(([frame], [2, 5], [1, 3, 4]), 24) for frame in (3, -3))
    frame = bands(24)[0] // 2
    torch.testing.assert_close(earlier[:, :, :frame], later[:, :, :frame] * torch.tensor([1.0, -1.0]))
    assert torch.equal(earlier[:, :, frame:], later[:, :, frame:])
    grid = grid_table((4, 6, 5), 24).view(4, 6, 5, 1, 12, 2)
    assert torch.equal(later.view(1, 2, 3, 1, 12, 2), grid[3:][:, [2, 5]][:, :, [1, 3, 4]])


def test_bands_of_a_published_head() -> None:
    assert bands(128) == (44, 42, 42)


def test_compiled_rotation_uses_real_numbers_and_agrees() -> None:
    x, table = torch.randn(1, 8, 2, 32), grid_table((2, 2, 2), 32)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table), rtol=0, atol=1e-6)
