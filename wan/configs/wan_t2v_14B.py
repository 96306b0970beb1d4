"""Wan 2.1 text-to-video and text-to-image 14B: one set of weights, two entries."""  # noqa: N999

from __future__ import annotations

from .shared_config import make_config

__all__ = ["t2i_14B", "t2v_14B"]

t2v_14B = make_config(  # noqa: N816
    "Wan T2V 14B",
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    sample_steps=50,
    sample_shift=5.0,
    sample_guide_scale=5.0,
)

t2i_14B = make_config("Wan T2I 14B", t2v_14B, frame_num=1)  # noqa: N816
