"""Guidance as data: named branches and, for each step, how much of each. Covers every linear guidance of the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from wan.engine.types import Coefficients, Condition, Denoiser, Step

Post = Callable[[Tensor, Mapping[str, Tensor], Tensor, Step], Tensor]
"""(guided velocity, velocity of each branch that ran, latents, step) -> velocity, for what is not linear."""


class Guidance:
    """The velocity a solver follows: `sum(a[k] * velocity[k])`, the coefficients of a step summing to 1.

    A branch whose coefficient is 0 is not run, so scale 1 costs one forward and intervals come free.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        branches: Mapping[str, Condition],
        coefficients: Coefficients,
        post: Sequence[Post] = (),
    ) -> None:
        self.denoiser = denoiser
        self.branches = branches
        self.coefficients = coefficients
        self.post = tuple(post)

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """Velocity of the shape of `latents` [B, C, T, H, W]; the denoiser is asked once."""
        weights = {name: weight for name, weight in self.coefficients(step).items() if weight != 0}
        velocities = self.denoiser(latents, step, {name: self.branches[name] for name in weights})
        # Upstream's order of operations, uncond + g * (cond - uncond), kept for equal rounding.
        base, *others = weights
        velocity = velocities[base]
        for name in others:
            velocity = velocity + weights[name] * (velocities[name] - velocities[base])
        for change in self.post:
            velocity = change(velocity, velocities, latents, step)
        return velocity


def cfg(guide_scale: tuple[float, float], high_expert: str = "high") -> Coefficients:
    """Classifier-free guidance between "uncond" and "cond"; `guide_scale` is (low-noise, high-noise expert).

    Source: arXiv:2207.12598, with Wan 2.2's scale per expert.
    """
    low, high = guide_scale

    def coefficients(step: Step) -> dict[str, float]:
        scale = high if step.expert == high_expert else low
        return {"uncond": 1 - scale, "cond": scale}

    return coefficients
