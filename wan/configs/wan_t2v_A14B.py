"""Wan 2.2 text-to-video A14B: two experts of 14B, one above and one below the boundary noise level."""  # noqa: N999

from __future__ import annotations

from .shared_config import make_config

__all__ = ["t2v_A14B"]

t2v_A14B = make_config(  # noqa: N816
    "Wan T2V A14B",
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    low_noise_checkpoint="low_noise_model",
    high_noise_checkpoint="high_noise_model",
    boundary=0.875,
    sample_steps=40,
    sample_shift=12.0,
    sample_guide_scale=(3.0, 4.0),  # (low, high) noise
)
