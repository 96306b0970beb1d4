"""Text to video, Wan 2.1 (one expert) and 2.2 (two experts by noise level), and text to image as its one-frame case."""

from __future__ import annotations

from wan.conditioning.text import embed
from wan.configs import WAN_CONFIGS
from wan.engine.sampling.plain import expert_schedule, guidance, one_shot
from wan.engine.types import Condition, Encoders, Family, Request, Shot


def text_branches(request: Request, shot: Shot, encoders: Encoders) -> dict[str, Condition]:
    """Unconditional and conditional branch; they differ in the text alone."""
    context = embed(encoders, [request.negative_prompt, request.prompt])
    return {"uncond": Condition(context=context[:1]), "cond": Condition(context=context[1:])}


FAMILY = Family(
    name="t2v",
    configs={task: config for task, config in WAN_CONFIGS.items() if task.startswith(("t2v", "t2i"))},
    branches=text_branches,
    schedule=expert_schedule,
    coefficients=guidance,
    next_shot=one_shot,
)
