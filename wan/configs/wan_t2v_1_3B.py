"""Wan 2.1 text-to-video 1.3B."""  # noqa: N999

from __future__ import annotations

from .shared_config import make_config

__all__ = ["t2v_1_3B"]

t2v_1_3B = make_config(  # noqa: N816
    "Wan T2V 1.3B",
    dim=1536,
    ffn_dim=8960,
    num_heads=12,
    num_layers=30,
    sample_steps=50,
    sample_shift=5.0,
    sample_guide_scale=5.0,
)
