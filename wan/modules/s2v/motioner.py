"""The frames before a clip as a few tokens: the newest finely, older ones coarser, the oldest coarsest.

Source: the frame packing of Zhang and Agrawala 2025, arXiv:2504.12626, with the buckets of Wan 2.2.

Letters: B batch, C channels, M latent frames, H/W latent height/width, L tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.ops.rope import places_table
from wan.modules.embedding import patchify

__all__ = ["MOTION_LATENTS", "FramePackMotioner", "motion_table"]

BUCKETS = (("proj", 1, 1), ("proj_2x", 2, 2), ("proj_4x", 16, 4))
"""Newest first: the projection, how many latent frames it takes, and how many times it is coarser than the video."""

MOTION_LATENTS = sum(frames for _, frames, _ in BUCKETS)
COARSEST = 8
"""Latent pixels a side of the largest patch."""


class FramePackMotioner(nn.Module):
    """Packs the last 19 latent frames of what came before."""

    def __init__(self, inner_dim: int, channels: int = 16) -> None:
        super().__init__()
        for (name, _, coarse), time in zip(BUCKETS, (1, 2, 4), strict=True):
            size = (time, 2 * coarse, 2 * coarse)
            setattr(self, name, nn.Conv3d(channels, inner_dim, size, stride=size))

    def forward(self, motion: Tensor) -> Tensor:
        """[B, C, M, H, W], the last 19 of M or zeros in front -> [B, L, D]. Raises BadRequest for an odd size."""
        if any(size % COARSEST for size in motion.shape[3:]):
            raise BadRequest(
                f"motion latents of {tuple(motion.shape[3:])!r} cannot be packed: height and width must be multiples "
                f"of {COARSEST} latent pixels, {8 * COARSEST} of the video"
            )
        lacking = MOTION_LATENTS - motion.shape[2]
        rest = F.pad(motion, (0, 0, 0, 0, max(lacking, 0), 0))[:, :, -MOTION_LATENTS:]
        tokens = []
        for name, frames, _ in BUCKETS:
            layer = self.get_submodule(name)
            assert isinstance(layer, nn.Conv3d)
            tokens.append(patchify(rest[:, :, -frames:].to(layer.weight.dtype), layer))
            rest = rest[:, :, :-frames]
        return torch.cat(tokens, 1)


def motion_table(grid: tuple[int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotary table [L, 1, D / 2, 2] of the packed tokens before a video of (rows, columns) tokens.

    They stand before frame 0. A coarse grid is spread over the fine one.
    """
    tables, frame = [], 0
    for (_, frames, coarse), time in zip(BUCKETS, (1, 1, 4), strict=True):
        frame -= frames
        times = [frame + place for place in _spread(time, frames)]
        rows, columns = (_spread(size // coarse, size) for size in grid)
        tables.append(places_table((times, rows, columns), head_dim, device))
    return torch.cat(tables)


def _spread(count: int, over: int) -> list[int]:
    """`count` places from 0 to over - 1, rounded down."""
    if count == 1:
        return [0]
    step = (over - 1) / (count - 1)
    return [*(int(index * step) for index in range(count - 1)), over - 1]
