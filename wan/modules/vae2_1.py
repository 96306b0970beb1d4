"""Upstream 2.2's name of VAE 2.1."""

from __future__ import annotations

from wan.modules.vae import WanVAE

__all__ = ["Wan2_1_VAE"]


class Wan2_1_VAE(WanVAE):  # noqa: N801 (upstream's name)
    """VAE 2.1: stride (4, 8, 8), 16 latent channels; same arguments and methods as `WanVAE`."""
