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
    boundary=0.8,
    frame_num=33,
    sample_steps=20,
    sample_shift=3.0,
    sample_guide_scale=(4.0, 4.0),
    sample_neg_prompt="",
    # What a published model has in common and this one has not: sizes of text encoder and VAE, for --load_format dummy.
    t5_sizes={"vocab_size": 160, "dim": 128, "dim_attn": 128, "dim_ffn": 256, "num_heads": 4, "encoder_layers": 2},
    vae_sizes={"encoder_dim": 8, "decoder_dim": 8, "num_res_blocks": 1},
)
