"""Rotary position embedding over a (frame, row, column) grid.

Source: Su et al. 2021, arXiv:2104.09864. Adjacent channels form a pair; the head's pairs are split in three bands, one
each for the frame, the row and the column of a token.

Letters: B batch, L tokens, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bands(head_dim: int) -> tuple[int, int, int]:
    """Channels that rotate with the frame, the row and the column; the frame gets what is left over."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def axis_table(
    positions: Sequence[int] | Tensor, channels: int, theta: float = 10000.0, replaced: dict[int, float] | None = None
) -> Tensor:
    """(cos, sin) of every position and pair as float32 [P, channels / 2, 2], from float64 angles.

    `replaced` gives some pairs another frequency, radians a position.
    """
    positions = torch.as_tensor(positions, dtype=torch.float64, device="cpu")
    frequencies = theta ** -(torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels)
    for pair, frequency in (replaced or {}).items():
        frequencies[pair] = frequency
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), -1).float()


def grid_table(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device | str | None = None,
    replaced: dict[int, float] | None = None,
) -> Tensor:
    """(cos, sin) of every token of a grid as float32 [L, 1, D / 2, 2]; tokens run frame, row, column.

    `replaced` frequencies are those of the frames.
    """
    return places_table((range(grid[0]), range(grid[1]), range(grid[2])), head_dim, device, replaced)


def places_table(
    places: tuple[Sequence[int], Sequence[int], Sequence[int]],
    head_dim: int,
    device: torch.device | str | None = None,
    replaced: dict[int, float] | None = None,
) -> Tensor:
    """`grid_table` of a grid whose frames, rows and columns stand at these places, which may be negative.

    Only the three short axis tables are computed and copied; the grid is spread out on `device`.
    """
    grid = (len(places[0]), len(places[1]), len(places[2]))
    time, *sides = bands(head_dim)
    axes = [axis_table(places[0], time, replaced=replaced)]
    axes += [axis_table(each, width) for each, width in zip(places[1:], sides, strict=True)]
    views = ((grid[0], 1, 1), (1, grid[1], 1), (1, 1, grid[2]))
    spread = [
        axis.to(device).view(*view, *axis.shape[1:]).expand(*grid, -1, -1)
        for axis, view in zip(axes, views, strict=True)
    ]
    return torch.cat(spread, dim=3).reshape(-1, 1, head_dim // 2, 2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """`x` [B, L, N, D] with every pair turned by its angle, float32; `table` is [L, 1, D / 2, 2].

    Eager mode multiplies complex numbers: one pass over memory, a tenth of the time of real arithmetic on a CPU.
    Compiled code uses real arithmetic, because inductor cannot fuse complex numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)).flatten(-2)
    a, b = pairs.unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
