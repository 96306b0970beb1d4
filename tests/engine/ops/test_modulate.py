"""Modulation by rows equals modulation that was expanded to every token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wan.engine.ops.linear import project
from wan.engine.ops.modulate import gated_add, norm_modulate


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("with_rows", [False, True])
def test_rows_equal_the_expanded_table(batch: int, with_rows: bool) -> None:
    x, y = torch.randn(2, batch, 6, 8)
    rows = torch.tensor([2, 0, 0, 1, 2, 1]) if with_rows else None
    shift, scale, gate = torch.randn(3, batch, 3 if with_rows else 1, 8)
    index = rows if rows is not None else torch.zeros(6, dtype=torch.long)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, index]) + shift[:, index]
    torch.testing.assert_close(norm_modulate(x, shift, scale, rows), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gated_add(x, y, gate, rows), x + y * gate[:, index], rtol=1e-5, atol=1e-6)


def test_residual_stays_float32_whatever_is_added() -> None:
    out = gated_add(torch.randn(1, 3, 8), torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 1, 8))
    assert out.dtype == torch.float32


def test_project_gives_every_projection() -> None:
    x, first, second = torch.randn(3, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
    a, b = project(x, first, second)
    assert torch.equal(a, first(x)) and torch.equal(b, second(x))
