"""What guidance may do beyond its linear formula: changes of the branches before it, of the result after it.

Velocities are [B, C, T, H, W]; `cond` and `uncond` those with and without the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 1e-8


def zero_star(cond: Tensor, uncond: Tensor) -> Tensor:
    """`uncond` scaled by its projection on `cond`, <c, u> / |u|^2 per sample. Source: CFG-Zero*, arXiv:2503.18886."""
    dims = tuple(range(1, cond.ndim))
    scale = (cond * uncond).sum(dims, keepdim=True) / (uncond.square().sum(dims, keepdim=True) + SMALL)
    return scale * uncond


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """`guided` brought back to the standard deviation of `cond`, mixed in by `share` of 0 to 1.

    Source: arXiv:2305.08891, eq. 15 and 16.
    """
    dims = tuple(range(1, cond.ndim))
    factor = cond.std(dims, keepdim=True) / (guided.std(dims, keepdim=True) + SMALL)
    return guided * (share * factor + (1 - share))


def frequency_scaled(cond: Tensor, uncond: Tensor, low: float, high: float, cutoff: int) -> Tensor:
    """`cond` with its difference to `uncond` scaled by `low` in the square of frequencies below `cutoff`, else `high`.

    The frequencies are those of rows and columns. Source: FreSca, arXiv:2504.02154.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2((cond - uncond).float()), dim=(-2, -1))
    scale = torch.full(spectrum.shape[-2:], high, device=cond.device)
    rows, columns = (slice(max(0, size // 2 - cutoff), size // 2 + cutoff) for size in scale.shape)
    scale[rows, columns] = low
    changed = torch.fft.ifft2(torch.fft.ifftshift(spectrum * scale, dim=(-2, -1))).real
    return uncond + changed.to(cond.dtype)


@dataclass
class AdaptiveProjection:
    """`uncond` changed so that guidance follows the part of the difference that is orthogonal to `cond`.

    `momentum` is of the differences of earlier steps (negative: away from them), `limit` the largest norm of a
    difference, `parallel` the share of the parallel part that is kept. Source: APG, arXiv:2410.02416.
    """

    momentum: float
    limit: float
    parallel: float
    _before: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor) -> Tensor:
        difference = cond - uncond
        if self._before is not None:
            difference = difference + self.momentum * self._before
        self._before = difference
        dims = tuple(range(1, cond.ndim))
        norm = difference.square().sum(dims, keepdim=True).sqrt()
        difference = difference * (self.limit / (norm + SMALL)).clamp(max=1.0)
        along = zero_star(difference, cond)
        return cond - (difference - along + self.parallel * along)
