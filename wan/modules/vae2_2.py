"""Upstream's VAE 2.2, used by ti2v-5B."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from wan.engine.errors import BadCheckpoint
from wan.modules.vae import WanVAE

__all__ = ["Wan2_2_VAE"]


class Wan2_2_VAE(WanVAE):  # noqa: N801 (upstream's name)
    """VAE 2.2: stride (4, 16, 16), 48 latent channels; otherwise as `WanVAE`.

    Widths are read from the file: `c_dim`, `dim_mult` and `temperal_downsample` are accepted and not needed.
    """

    def __init__(
        self,
        z_dim: int = 48,
        c_dim: int = 160,
        vae_pth: str | os.PathLike[str] | None = None,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dtype: torch.dtype = torch.float,
        device: torch.device | str = "cuda",
    ) -> None:
        if vae_pth is None:
            raise BadCheckpoint("vae_pth=None holds no weights; pass the path of Wan2.2_VAE.pth")
        super().__init__(z_dim, vae_pth, dtype, device)
