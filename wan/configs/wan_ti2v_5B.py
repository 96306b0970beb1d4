"""Wan 2.2 text- and image-to-video 5B, on the VAE that shrinks pictures sixteenfold."""  # noqa: N999

from __future__ import annotations

from .shared_config import make_config

__all__ = ["ti2v_5B"]

ti2v_5B = make_config(  # noqa: N816
    "Wan TI2V 5B",
    vae_checkpoint="Wan2.2_VAE.pth",
    vae_stride=(4, 16, 16),
    z_dim=48,
    dim=3072,
    ffn_dim=14336,
    num_heads=24,
    num_layers=30,
    sample_fps=24,
    frame_num=121,
    sample_steps=50,
    sample_shift=5.0,
    sample_guide_scale=5.0,
)
