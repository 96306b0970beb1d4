"""Wan 2.2 image-to-video A14B: two experts of 14B that are given the image by channels alone."""  # noqa: N999

from __future__ import annotations

from .shared_config import make_config
from .wan_t2v_A14B import t2v_A14B

__all__ = ["i2v_A14B"]

i2v_A14B = make_config(  # noqa: N816
    "Wan I2V A14B",
    t2v_A14B,
    boundary=0.900,
    sample_shift=5.0,
    sample_guide_scale=(3.5, 3.5),  # (low, high) noise
    # What a checkpoint's config.json has and this must say for --load_format dummy; no CLIP in 2.2.
    in_dim=36,
    model_type="i2v",
    image_dim=0,
)
