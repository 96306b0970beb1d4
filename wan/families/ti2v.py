"""Text to video and image to video with one model, Wan 2.2's 5B: a picture is the first latent frame, at timestep 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wan.conditioning.first_frame import known_first_frame
from wan.conditioning.text import embed
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.plain import anchored_shot, expert_schedule, guidance, one_shot
from wan.engine.types import Condition, Encoders, Family, Known, Request, Shot


@dataclass(frozen=True, kw_only=True)
class TI2VInputs:
    """`first` is the first frame [3, 1, H, W] in -1..1, of the video's size; None is text to video."""

    first: Tensor | None = None


def text_branches(request: Request, shot: Shot, encoders: Encoders) -> dict[str, Condition]:
    context = embed(encoders, [request.negative_prompt, request.prompt])
    return {"uncond": Condition(context=context[:1]), "cond": Condition(context=context[1:])}


def first_frame(request: Request, shot: Shot, encoders: Encoders) -> Known | None:
    """The picture's latents: kept through all steps, and told to the model as noiseless."""
    first = None if request.inputs is None else request.inputs.first
    if first is None:
        return None
    return known_first_frame(encoders, first, shot.latent_shape)


def next_shot(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    given = request.inputs is not None and request.inputs.first is not None
    return (anchored_shot if given else one_shot)(request, config, index, carry)


FAMILY = Family(
    name="ti2v",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith("ti2v")},
    inputs=TI2VInputs,
    branches=text_branches,
    schedule=expert_schedule,
    coefficients=guidance,
    next_shot=next_shot,
    known=first_frame,
)
