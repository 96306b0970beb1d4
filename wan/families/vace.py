"""VACE: video from references, from a control video, and inside or around a mask."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.control import control_latents
from wan.conditioning.text import embed
from wan.conditioning.video import Clip
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.plain import expert_schedule, guidance, one_shot
from wan.engine.types import Condition, Encoders, Family, Request, Shot
from wan.modules.vace_model import VaceCondition


@dataclass(frozen=True, kw_only=True)
class VaceInputs:
    """What guides the video, see `wan.conditioning.control`: all of the video's size; None is grey, a full mask.

    `context_scale` is how strongly, 1 as trained.
    """

    frames: Tensor | Clip | None = None
    mask: Tensor | Clip | None = None
    refs: tuple[Tensor, ...] = ()
    context_scale: float = 1.0


def control_branches(request: Request, shot: Shot, encoders: Encoders) -> dict[str, Condition]:
    """Both branches see the same control; they differ in the text alone."""
    given: VaceInputs = request.inputs
    context = embed(encoders, [request.negative_prompt, request.prompt])
    with encoders.use("vae") as vae:
        size = request.num_frames, request.height, request.width
        control = control_latents(vae, given.frames, given.mask, given.refs, size, encoders.tiling).to(encoders.device)
    scale = torch.full((1,), float(given.context_scale), device=encoders.device)
    branch = VaceCondition(context=context[:1], control=control, control_scale=scale)
    return {"uncond": branch, "cond": dataclasses.replace(branch, context=context[1:], memo={})}


def prefixed_shot(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    """The whole video at once; each reference is a latent frame before it, which is not decoded."""
    shot = one_shot(request, config, index, carry)
    if shot is None:
        return None
    before = len(request.inputs.refs)
    channels, frames, rows, columns = shot.latent_shape
    return dataclasses.replace(
        shot, latent_shape=(channels, before + frames, rows, columns), anchor=before, keep=slice(before, None)
    )


FAMILY = Family(
    name="vace",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith("vace")},
    inputs=VaceInputs,
    condition=VaceCondition,
    branches=control_branches,
    schedule=expert_schedule,
    coefficients=guidance,
    next_shot=prefixed_shot,
)
