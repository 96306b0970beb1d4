"""Wan 2.2 Animate 14B: a character moves as somebody in a video does, clips of 77 frames one after another."""  # noqa: N999

from __future__ import annotations

import torch

from .shared_config import make_config
from .wan_t2v_14B import t2v_14B

__all__ = ["animate_14B"]

animate_14B = make_config(  # noqa: N816
    "Wan Animate 14B",
    t2v_14B,
    clip_model="clip_xlm_roberta_vit_h_14",
    clip_dtype=torch.float16,
    clip_checkpoint="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    clip_tokenizer="xlm-roberta-large",
    lora_checkpoint="relighting_lora.ckpt",
    prompt="视频中的人在做动作",
    sample_fps=30,
    frame_num=77,
    sample_steps=20,
    sample_shift=5.0,
    sample_guide_scale=1.0,
    motion_encoder_dim=512,
    use_face_encoder=True,
    face_size=512,  # pixels a side of src_face.mp4; of upstream's only motion encoder
    in_dim=36,  # what a checkpoint's config.json has and this must say for --load_format dummy
)
