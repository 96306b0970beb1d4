"""The small model shipped in demo/: Wan 2.2's two experts at 96x96, trained to be watched on a CPU."""

from __future__ import annotations

import torch

from .shared_config import make_config

__all__ = ["t2v_demo"]

t2v_demo = make_config(
    "Wan T2V demo",
    t5_dtype=torch.float32,
    param_dtype=torch.float32,
    text_len=32,
    dim=256,
    ffn_dim=768,
    num_heads=2,
    num_layers=5,
    freq_dim=128,
    low_noise_checkpoint="low_noise_model",
    high_noise_checkpoint="high_noise_model",
    boundary=0.875,
    frame_num=33,
    sample_steps=20,
    sample_shift=3.0,
    sample_guide_scale=(4.0, 4.0),
    sample_neg_prompt="",
)
