"""Image to video, Wan 2.1 (with CLIP) and 2.2 (two experts, without), and from a first to a last frame."""

from __future__ import annotations

from wan.conditioning.image import ImageInputs, image_branches
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.plain import anchored_shot, expert_schedule, guidance
from wan.engine.types import Family
from wan.modules.image_embedding import ImageCondition

FAMILY = Family(
    name="i2v",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith(("i2v", "flf2v"))},
    inputs=ImageInputs,
    condition=ImageCondition,
    encoders=("text_encoder", "clip", "vae"),
    branches=image_branches,
    schedule=expert_schedule,
    coefficients=guidance,
    next_shot=anchored_shot,
)
