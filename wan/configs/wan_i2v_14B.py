"""Wan 2.1 image-to-video 14B (the 480P and 720P checkpoints) and first-last-frame-to-video 14B, both with CLIP."""  # noqa: N999

from __future__ import annotations

import torch

from .shared_config import NEGATIVE_PROMPT, make_config
from .wan_t2v_14B import t2v_14B

__all__ = ["flf2v_14B", "i2v_14B"]

i2v_14B = make_config(  # noqa: N816
    "Wan I2V 14B",
    t2v_14B,
    sample_neg_prompt=f"镜头晃动，{NEGATIVE_PROMPT}",
    clip_model="clip_xlm_roberta_vit_h_14",
    clip_dtype=torch.float16,
    clip_checkpoint="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    clip_tokenizer="xlm-roberta-large",
    sample_steps=40,
    sample_shift_of_size={"832*480": 3.0, "480*832": 3.0},  # in place of sample_shift, as upstream's program has it
    # What a checkpoint's config.json has and this must say for --load_format dummy.
    in_dim=36,
    model_type="i2v",
)

flf2v_14B = make_config(  # noqa: N816
    "Wan FLF2V 14B",
    i2v_14B,
    sample_neg_prompt=f"镜头切换，{i2v_14B.sample_neg_prompt}",
    sample_steps=50,
    sample_shift=16.0,
    sample_shift_of_size={},
    model_type="flf2v",
)
