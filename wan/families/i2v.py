"""Image to video, Wan 2.1 (with CLIP) and 2.2 (two experts, without), and from a first to a last frame.

A video longer than a clip of the model's can be made clip by clip, each going on from the end of the one before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from wan.conditioning.image import ImageInputs, image_branches
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.plain import anchored_shot, expert_schedule, guidance
from wan.engine.types import Family, Request, Shot
from wan.modules.image_embedding import ImageCondition


def next_clip(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    """The whole video, or the clip of that number; each has a seed of its own, counted up from the request's."""
    given: ImageInputs = request.inputs
    clips = given.clips(request.num_frames)
    if index >= len(clips):
        return None
    shot = anchored_shot(replace(request, num_frames=clips[index]), config, 0, None)
    assert shot is not None
    if len(clips) == 1:
        return shot
    shared = given.extend_overlap
    return replace(
        shot,
        index=index,
        before=carry,
        reseed=(request.seed + index) % 2**64,
        anchor=1 if carry is None else (shared - 1) // config.vae_stride[0] + 1,
        trim=slice(0 if carry is None else shared, None),
        carry_frames=shared if index + 1 < len(clips) else 0,
    )


FAMILY = Family(
    name="i2v",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith(("i2v", "flf2v"))},
    inputs=ImageInputs,
    condition=ImageCondition,
    encoders=("text_encoder", "clip", "vae"),
    branches=image_branches,
    schedule=expert_schedule,
    coefficients=guidance,
    next_shot=next_clip,
    shot_frames=lambda request: max(request.inputs.clips(request.num_frames)),
)
