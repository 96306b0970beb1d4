"""What most families have in common: experts by noise level, one shot, classifier-free guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from wan.engine.sampling.guidance import cfg
from wan.engine.sampling.schedule import flow_steps
from wan.engine.types import Coefficients, Request, Shot, Step


def expert_schedule(request: Request, config: Any) -> tuple[Step, ...]:
    """Flow-matching steps; timesteps at or above the config's boundary belong to the high-noise expert."""
    boundary = config.get("boundary")
    if boundary is None:
        return flow_steps(request.solver, request.steps, request.shift)
    threshold = boundary * config.num_train_timesteps
    return flow_steps(request.solver, request.steps, request.shift, lambda t: "high" if t >= threshold else "low")


def one_shot(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    """The whole video at once."""
    if index:
        return None
    time, rows, columns = config.vae_stride
    frames = (request.num_frames - 1) // time + 1
    return Shot(latent_shape=(config.get("z_dim", 16), frames, request.height // rows, request.width // columns))


def anchored_shot(request: Request, config: Any, index: int, carry: Tensor | None) -> Shot | None:
    """The whole video at once, with its first latent frame in every window of it: what it shows is given."""
    shot = one_shot(request, config, index, carry)
    return None if shot is None else replace(shot, anchor=1)


def guidance(request: Request, config: Any) -> Coefficients:
    """Classifier-free guidance with one scale per expert."""
    return cfg(request.guide_scale)
