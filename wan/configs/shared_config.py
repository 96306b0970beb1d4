"""What every task's configuration shares, and the one way an entry is made.

Entries are EasyDicts under upstream's field names, because code written for upstream reads and changes them.
"""

from __future__ import annotations

from typing import Any

import torch
from easydict import EasyDict

__all__ = ["make_config", "wan_shared_cfg"]

# The published results depend on this text: keep it byte for byte (a test holds its SHA-256).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

wan_shared_cfg = EasyDict(
    # text encoder
    t5_model="umt5_xxl",
    t5_dtype=torch.bfloat16,
    text_len=512,
    t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth",
    t5_tokenizer="google/umt5-xxl",
    # VAE
    vae_checkpoint="Wan2.1_VAE.pth",
    vae_stride=(4, 8, 8),
    # DiT
    param_dtype=torch.bfloat16,
    patch_size=(1, 2, 2),
    freq_dim=256,
    window_size=(-1, -1),
    qk_norm=True,
    cross_attn_norm=True,
    eps=1e-6,
    # inference
    num_train_timesteps=1000,
    sample_fps=16,
    sample_neg_prompt=NEGATIVE_PROMPT,
    frame_num=81,
)


def make_config(name: str, base: EasyDict = wan_shared_cfg, **values: Any) -> EasyDict:
    """A new entry called `name`: the fields of `base`, overridden and completed by `values`."""
    config = EasyDict(base)
    config.update(values)
    config["__name__"] = f"Config: {name}"
    return config
