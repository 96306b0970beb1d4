"""Speech to video: a picture speaks, clip after clip, each going on from the last frames of the one before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.speech import PoseVideo
from wan.conditioning.text import embed
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.guidance import cfg
from wan.engine.sampling.schedule import flow_steps
from wan.engine.types import Coefficients, Condition, Encoders, Family, Request, Shot, Step
from wan.modules.s2v.model_s2v import SpeechCondition

UNSETTLED = 3
"""Frames at the very beginning that show the video settling; upstream leaves them out."""

FROM_REFERENCE = 6
"""How many of the frames before the first clip are the reference, where it begins with it."""


@dataclass(frozen=True, kw_only=True)
class SpeechInputs:
    """Who speaks (`reference` [3, 1, H, W] in -1..1) and what: `audio` [1, layers, A, clips x clip_frames].

    `start_from_ref` begins the video with the reference.
    """

    reference: Tensor
    audio: Tensor
    clips: int
    clip_frames: int = 80
    pose: PoseVideo | None = None
    start_from_ref: bool = False


def length(config: Any, clips: int, clip_frames: int, start_from_ref: bool) -> int:
    """How many frames `clips` clips give."""
    return clips * clip_frames - lead(config, start_from_ref)


def lead(config: Any, start_from_ref: bool) -> int:
    """How many frames of sound pass before the first frame that is shown."""
    return 0 if start_from_ref or not config.drop_first_motion else UNSETTLED


def next_clip(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    """The clip of that number; None where the frames or the sound have ended."""
    given: SpeechInputs = request.inputs
    skipped = lead(config, given.start_from_ref)
    begin = max(0, index * given.clip_frames - skipped)
    if index >= given.clips or begin >= request.num_frames:
        return None
    time, rows, columns = config.vae_stride
    motion = config.motion_frames
    frames = (given.clip_frames + time - 1 + motion) // time - (motion + time - 1) // time
    first = index == 0 and skipped > 0
    # Behind the reference's one frame, or behind those of the clip before.
    start = 1 + skipped if first else motion
    kept = given.clip_frames - (skipped if first else 0)
    return Shot(
        latent_shape=(config.get("z_dim", 16), frames, request.height // rows, request.width // columns),
        reseed=(request.seed + index) % 2**64,
        index=index,
        before=None if first else _before(given, motion, carry),
        trim=slice(start, start + min(kept, request.num_frames - begin)),
        carry_frames=motion,
    )


def _before(given: SpeechInputs, count: int, carry: Tensor | None) -> Tensor:
    """[3, count, H, W]: the last frames there are; before the video grey ones, or the reference at their end."""
    still = torch.zeros_like(given.reference).expand(-1, count, -1, -1)
    if given.start_from_ref:
        still = torch.cat([still[:, FROM_REFERENCE:], given.reference.expand(-1, FROM_REFERENCE, -1, -1)], dim=1)
    return still if carry is None else torch.cat([still.to(carry), carry], dim=1)[:, -count:]


def clip_prefix(request: Request, shot: Shot, encoders: Encoders) -> Tensor | None:
    """What a clip is decoded behind: the latents of the frames before it, of the first clip those of the reference."""
    return _reference(request, encoders) if shot.before is None else _latents(encoders, shot.before)


def speech_branches(request: Request, shot: Shot, encoders: Encoders) -> dict[str, Condition]:
    """The unconditional branch hears nothing; both see who speaks, the pose, and what came before."""
    given: SpeechInputs = request.inputs
    prompts = [request.negative_prompt, request.prompt]
    context: Tensor = encoders.once("text", lambda: embed(encoders, prompts))
    begin = shot.index * given.clip_frames
    audio = given.audio[..., begin : begin + given.clip_frames].to(encoders.device)
    cond = SpeechCondition(
        context=context[1:], audio=audio, reference=_reference(request, encoders),
        motion=None if shot.before is None else shot.prefix, pose=_pose(request, encoders, begin),
    )  # fmt: skip
    return {
        "uncond": dataclasses.replace(cond, context=context[:1], audio=torch.zeros_like(audio), memo={}),
        "cond": cond,
    }


def _reference(request: Request, encoders: Encoders) -> Tensor:
    latents: Tensor = encoders.once("reference", lambda: _latents(encoders, request.inputs.reference))
    return latents


def _pose(request: Request, encoders: Encoders, begin: int) -> Tensor | None:
    """Latents of the pose in a clip; the VAE makes one latent of a first frame, so that comes twice and is cut off."""
    given: SpeechInputs = request.inputs
    if given.pose is None:
        return None
    frames = given.pose.clip(begin, given.clip_frames, request.height, request.width)
    return _latents(encoders, torch.cat([frames[:, :1], frames], dim=1))[:, :, 1:]


def _latents(encoders: Encoders, frames: Tensor) -> Tensor:
    """float32 [1, C, T, h, w] on the engine's device, of frames [3, N, H, W]."""
    with encoders.use("vae") as vae:
        latents: Tensor = vae.encode(frames[None].to(next(vae.parameters())), tiling=encoders.tiling)
    return latents.to(encoders.device, torch.float32)


def schedule(request: Request, config: Any) -> tuple[Step, ...]:
    return flow_steps(request.solver, request.steps, request.shift)


def guidance(request: Request, config: Any) -> Coefficients:
    return cfg(request.guide_scale)


FAMILY = Family(
    name="s2v",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith("s2v")},
    inputs=SpeechInputs,
    condition=SpeechCondition,
    branches=speech_branches,
    schedule=schedule,
    coefficients=guidance,
    next_shot=next_clip,
    prefix=clip_prefix,
    shot_frames=lambda request: request.inputs.clip_frames + 1,
)
