"""Animate: a character moves as a skeleton and a face do, on its own or in place of a person in a video.

A video longer than a clip is made clip by clip, each beginning with the last frames of the one before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.character import Sources, encode_clip, faces, letterboxed, surroundings, there_and_back
from wan.conditioning.image import look_at
from wan.conditioning.text import embed
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.plain import expert_schedule, guidance
from wan.engine.types import Condition, Encoders, Family, Request, Shot
from wan.modules.animate.model_animate import AnimateCondition, led_by_reference


@dataclass(frozen=True, kw_only=True)
class AnimateInputs:
    """What moves the character; `clip_len` frames are made at once, `overlap` of them with the clip before."""

    sources: Sources
    clip_len: int = 77
    overlap: int = 1


def next_clip(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    """The clip of that number; None where the skeleton has ended. Latent frame 0 is the reference, not decoded."""
    given: AnimateInputs = request.inputs
    start = index * (given.clip_len - given.overlap)
    if index and start + given.overlap >= request.num_frames:
        return None
    time, rows, columns = config.vae_stride
    stop = min(given.clip_len, request.num_frames - start)
    frames = (given.clip_len - 1) // time + 1
    return Shot(
        latent_shape=(config.get("z_dim", 16), 1 + frames, request.height // rows, request.width // columns),
        anchor=1,
        index=index,
        before=carry if index else None,
        # Of the last clip no more is decoded than is shown: the VAE does not look ahead.
        keep=slice(1, 2 + (stop - 1 + time - 1) // time),
        trim=slice(given.overlap if index else 0, stop),
        carry_frames=given.overlap,
    )


def character_branches(request: Request, shot: Shot, encoders: Encoders) -> dict[str, Condition]:
    """The unconditional branch has the negative text and a black face; both see the reference and the skeleton."""
    given: AnimateInputs = request.inputs
    sources, start = given.sources, shot.index * (given.clip_len - given.overlap)
    numbers = there_and_back(sources.frames, start, start + given.clip_len)
    context: Tensor = encoders.once("text", lambda: embed(encoders, [request.negative_prompt, request.prompt]))
    image, reference = encoders.once("reference", lambda: _reference(request, encoders))
    with encoders.use("vae") as vae:
        pose = encode_clip(vae, sources.pose, numbers, tiling=encoders.tiling).to(encoders.device, torch.float32)
        rest = surroundings(vae, sources, numbers, shot.before, encoders.tiling).to(encoders.device, torch.float32)
    aligned = led_by_reference(pose, faces(sources.face, numbers).to(encoders.device))
    cond = AnimateCondition(
        context=context[1:], channels=torch.cat((reference, rest), dim=2), image=image, pose=aligned["pose"],
        face=aligned["face"],
    )  # fmt: skip
    black = torch.full((1, 1, 1, 1, 1), -1.0, device=encoders.device).expand_as(cond.face)
    return {"uncond": dataclasses.replace(cond, context=context[:1], face=black, memo={}), "cond": cond}


def _reference(request: Request, encoders: Encoders) -> tuple[Tensor, Tensor]:
    """CLIP's view of the character, and [1, 4 + z, 1, h, w]: a latent frame that is given, with its mask."""
    pixels = letterboxed(request.inputs.sources.reference, request.width, request.height)
    image = look_at(encoders, [pixels])
    with encoders.use("vae") as vae:
        latents: Tensor = vae.encode(pixels[None, :, None].to(next(vae.parameters())), tiling=encoders.tiling)
    latents = latents.to(encoders.device, torch.float32)
    return image, torch.cat((torch.ones_like(latents[:, :1]).expand(-1, 4, -1, -1, -1), latents), dim=1)


FAMILY = Family(
    name="animate",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith("animate")},
    inputs=AnimateInputs,
    condition=AnimateCondition,
    encoders=("text_encoder", "clip", "vae"),
    branches=character_branches,
    schedule=expert_schedule,
    coefficients=guidance,
    next_shot=next_clip,
    shot_frames=lambda request: request.inputs.clip_len,
)
