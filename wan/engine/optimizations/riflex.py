"""Videos somewhat longer than a model was trained for, in one piece, without the motion beginning again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.ops.rope import bands, grid_table
from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.types import Denoising

if TYPE_CHECKING:
    from wan.engine.engine import Engine

SHARE = 0.9
"""Of a turn that the slowed frequency makes over the whole video."""


@dataclass(frozen=True, kw_only=True)
class RIFLEx(Optimization):
    """Slow the one rotary frequency of the frames whose period is the trained length, below one turn in the video.

    A video up to about twice the trained length then does not repeat itself. Source: RIFLEx, arXiv:2502.15894.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "nothing"
    per_call = True
    riflex: int = option(0, "number of the temporal frequency to slow, from 1; 6 suits the published models")

    def check(self, hardware: Hardware) -> None:
        if self.riflex < 0:
            raise BadRequest(f"--riflex {self.riflex!r}: give the number of a frequency, from 1, or 0 for off")

    def apply(self, engine: Engine) -> None:
        engine.wrap_segment(self._slow)

    @contextmanager
    def _slow(self, dit: nn.Module, run: Denoising) -> Iterator[None]:
        plain = dit.rope_table
        dit.rope_table = partial(slowed_table, self.riflex)  # type: ignore[assignment]
        try:
            yield
        finally:
            dit.rope_table = plain


def slowed_table(number: int, grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """`grid_table` whose temporal frequency `number` makes less than a turn over the frames of `grid`."""
    if number > (count := bands(head_dim)[0] // 2):
        raise BadRequest(f"--riflex {number!r}: this model has the frequencies 1 to {count}")
    return grid_table(grid, head_dim, device, {number - 1: SHARE * 2 * math.pi / grid[0]})
