"""How latents and timesteps enter the DiT and how patches leave it.

Letters: B batch, C channels, T/H/W latent frames/height/width, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.ops.modulate import norm_modulate
from wan.engine.ops.rows import run_length, runs
from wan.modules.blocks import WanLayerNorm

__all__ = [
    "Head",
    "distinct_rows",
    "frame_of_token",
    "linear32",
    "patchify",
    "sinusoidal_embedding_1d",
    "token_rows",
    "unpatchify",
]

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens."""


def sinusoidal_embedding_1d(dim: int, timestep: Tensor) -> Tensor:
    """Float32 [..., dim]: the cosines of all frequencies, then the sines; angles are float64."""
    half = dim // 2
    frequencies = 10000 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1).float()


def frame_of_token(grid: Grid, device: torch.device) -> Tensor:
    """[L] the latent frame of each token."""
    return torch.arange(grid[0], device=device)[:, None].expand(-1, grid[1] * grid[2]).reshape(-1)


def token_rows(timestep: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The distinct timesteps [B, U] and the row [L] of each token, None where one serves all.

    `timestep` is [B], [1] (for all), [B, T] (one per latent frame) or [B, L] (one per token). Raises BadRequest.
    """
    if timestep.ndim == 1:
        return timestep[:, None], None
    if timestep.shape[1] == grid[0]:
        return timestep, frame_of_token(grid, timestep.device)
    if timestep.shape[1] == math.prod(grid):
        return timestep, torch.arange(timestep.shape[1], device=timestep.device)
    if timestep.shape[1] != 1:
        raise BadRequest(
            f"timestep of shape {tuple(timestep.shape)!r} fits neither one per sample nor one per latent frame "
            f"({grid[0]}) nor one per token ({math.prod(grid)})"
        )
    return timestep, None


def distinct_rows(t: Tensor, members: list[int], count: int, grid: Grid, seq_len: int) -> tuple[Tensor, Tensor | None]:
    """`token_rows` of some of `count` samples, from upstream's two forms of `t`: [B] and [B, seq_len]."""
    length = math.prod(grid)
    if length > seq_len:
        raise BadRequest(f"latents of {grid} frames, rows and columns make {length} tokens; seq_len is {seq_len!r}")
    if t.shape[0] not in (1, count) or t.ndim > 2 or (t.ndim == 2 and t.shape[1] < length):
        raise BadRequest(
            f"t of shape {tuple(t.shape)!r}: give one timestep a sample, [{count}], or [{count}, {seq_len}]"
        )
    t = t.expand(count, *t.shape[1:])[members]
    if t.ndim == 1:
        return t[:, None], None
    distinct, rows = torch.unique(t[:, :length], dim=1, return_inverse=True)
    return distinct, None if distinct.shape[1] == 1 else rows


def linear32(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` computed in float32 whatever dtype its weights are stored in."""
    if not isinstance(layer, nn.Linear) or layer.weight.dtype == torch.float32:
        out: Tensor = layer(x)
        return out
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def patchify(latents: Tensor, embedding: nn.Conv3d) -> Tensor:
    """Tokens [B, L, D] of latents [B, C, T, H, W], frame by frame and row by row.

    The kernel does not overlap, so the convolution is one matrix product, which is faster than Conv3d everywhere.
    """
    b, c, t, h, w = latents.shape
    pt, ph, pw = embedding.kernel_size
    patches = latents.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return F.linear(patches.flatten(4).flatten(1, 3), embedding.weight.flatten(1), embedding.bias)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """[B, L, patch * C] with the channel last -> [B, C, T, H, W]."""
    x = tokens.unflatten(-1, (*patch_size, -1)).unflatten(1, grid)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Head(nn.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, dim: int, out_dim: int, patch_size: tuple[int, int, int], eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.out_dim, self.patch_size, self.eps = dim, out_dim, patch_size, eps
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, math.prod(patch_size) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, tokens: Tensor, embedding: Tensor, rows: Tensor | None = None) -> Tensor:
        """tokens [B, L, D], embedding of the timesteps [B, U, D], rows [L] -> float32 [B, L, patch * C]."""
        shift, scale = (self.modulation.float() + embedding[:, :, None]).unbind(2)
        parts = (  # a patch is far narrower than its token: whole, the normed tokens would be the largest tensor here
            norm_modulate(tokens[:, at], shift, scale, None if rows is None else rows[at], self.eps)
            for at in runs(tokens.shape[1], run_length(tokens))
        )
        return torch.cat([linear32(self.head, part) for part in parts], 1)
