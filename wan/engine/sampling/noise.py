"""The noise that a shot begins with, and that which some solvers add on the way."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from wan.engine.types import Request, Shot, Step

__all__ = ["first_latents", "fresh_noise"]


def first_latents(
    request: Request, shot: Shot, before: torch.Generator | None, device: torch.device
) -> tuple[torch.Generator, Tensor]:
    """The generator of a shot and its noise [1, C, T, H, W] on `device`.

    `before` is the generator of the shot before: it runs on unless the shot reseeds.
    """
    generator = before
    if generator is None or shot.reseed is not None:
        generator = torch.Generator(device=request.noise_device or device)
        generator.manual_seed(request.seed if shot.reseed is None else shot.reseed)
    # One sample without the batch axis, then the axis: the order of upstream's random numbers.
    noise = torch.randn(shot.latent_shape, dtype=torch.float32, device=generator.device, generator=generator)
    return generator, noise.to(device)[None]


def fresh_noise(request: Request, shot: int, step: Step, like: Tensor) -> Tensor:
    """Noise of the shape and device of `like`, known by seed, number of the shot and step.

    Not from the run's generator: a run that is continued, or only decoded, would find that elsewhere.
    """
    digest = hashlib.sha256(f"{request.seed}/{shot}/{step.index}".encode()).digest()
    generator = torch.Generator(device=request.noise_device or like.device)
    generator.manual_seed(int.from_bytes(digest[:7], "little"))
    noise = torch.randn(like.shape, dtype=torch.float32, device=generator.device, generator=generator)
    return noise.to(like.device)
