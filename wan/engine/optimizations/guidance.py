"""Guidance beyond its formula: where it acts, and what is corrected before and after it. All change the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan.engine.accounting import Place, Range
from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order
from wan.engine.sampling.corrections import AdaptiveProjection, frequency_scaled, rescaled, zero_star
from wan.engine.sampling.schedule import in_span, span
from wan.engine.types import Coefficients, Condition, Denoiser, Segment, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(cond, uncond) -> what guidance takes in their place."""


@dataclass(frozen=True, kw_only=True)
class CFGInterval(Optimization):
    """Guide only in part of the steps; in the others the prompt's forward alone is run.

    Guidance matters least in the first steps, where it can overshoot, and in the last, where it changes little.
    Source: arXiv:2404.07724.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "nothing: it saves forwards"
    per_call = True
    cfg_interval: str | None = option(None, "guide only in this share of the steps, FROM-TO in 0 to 1, as 0.1-0.8")

    def check(self, hardware: Hardware) -> None:
        span("--cfg_interval", self.cfg_interval)

    def apply(self, engine: Engine) -> None:
        interval = span("--cfg_interval", self.cfg_interval)

        def only_within(coefficients: Coefficients) -> Coefficients:
            def chosen(step: Step) -> dict[str, float]:
                weights = coefficients(step)
                return weights if in_span(step, interval) or "cond" not in weights else {"cond": 1.0}

            return chosen

        engine.wrap_coefficients(only_within)


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar(Optimization):
    """Scale the unconditional velocity to fit the conditional one before guidance; the first steps may stand still.

    Source: CFG-Zero*, arXiv:2503.18886.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "nothing"
    per_call = True
    conflicts = (
        Conflict("FreSca", "both change the difference that guidance amplifies"),
        Conflict("APG", "both change the difference that guidance amplifies"),
    )
    cfg_zero_star: bool = option(False, "fit the unconditional velocity to the conditional one (CFG-Zero*)")
    cfg_zero_init: int = option(0, "steps at the start that leave the noise as it is, at no cost")

    def check(self, hardware: Hardware) -> None:
        if self.cfg_zero_init < 0:
            raise BadRequest(f"--cfg_zero_init {self.cfg_zero_init!r}: give 0 or more steps")

    def apply(self, engine: Engine) -> None:
        engine.wrap_denoiser(lambda denoiser, dit, segment: _Still(denoiser, self.cfg_zero_init))
        engine.wrap_denoiser(_pairwise(lambda: lambda cond, uncond: (cond, zero_star(cond, uncond))))
        if self.cfg_zero_init:
            engine.expect_forwards(self._fewer)

    def _fewer(self, place: Place, planned: Range) -> Range:
        return max(0, planned[0] - self.cfg_zero_init), planned[1]


@dataclass(frozen=True, kw_only=True)
class FreSca(Optimization):
    """Scale what the prompt changes separately in coarse and in fine structures. Source: FreSca, arXiv:2504.02154."""

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "a Fourier transform of the latents a step"
    per_call = True
    conflicts = (Conflict("APG", "both change the difference that guidance amplifies"),)
    fresca: bool = option(False, "scale guidance by spatial frequency (FreSca)")
    fresca_low: float = option(1.0, "factor of the frequencies below the cutoff")
    fresca_high: float = option(1.25, "factor of the others")
    fresca_cutoff: int = option(20, "half the side of the square of low frequencies, in latent frequencies")

    def check(self, hardware: Hardware) -> None:
        if self.fresca_cutoff < 1:
            raise BadRequest(f"--fresca_cutoff {self.fresca_cutoff!r}: give 1 or more; 20 is the authors'")

    def apply(self, engine: Engine) -> None:
        def scaled(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
            changed = frequency_scaled(cond, uncond, self.fresca_low, self.fresca_high, self.fresca_cutoff)
            return changed, uncond

        engine.wrap_denoiser(_pairwise(lambda: scaled))


@dataclass(frozen=True, kw_only=True)
class APG(Optimization):
    """Guide along what is orthogonal to the conditional velocity, so that high scales saturate less.

    Source: adaptive projected guidance, arXiv:2410.02416.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "nothing"
    per_call = True
    apg: bool = option(False, "adaptive projected guidance")
    apg_momentum: float = option(-0.75, "weight of the differences of earlier steps")
    apg_limit: float = option(55.0, "largest norm of the difference; larger ones are shrunk to it")
    apg_parallel: float = option(0.0, "share of the part parallel to the conditional velocity that is kept")

    def check(self, hardware: Hardware) -> None:
        if not self.apg_limit > 0:
            raise BadRequest(f"--apg_limit {self.apg_limit!r}: give more than 0; 55 is usual")

    def apply(self, engine: Engine) -> None:
        def begin() -> Pair:
            projection = AdaptiveProjection(self.apg_momentum, self.apg_limit, self.apg_parallel)
            return lambda cond, uncond: (cond, projection(cond, uncond))

        # Momentum is of steps that were guided before: a run continued in the middle would have none.
        engine.resume_only(lambda step: self.apg_momentum == 0 or step.index == 0)
        engine.wrap_denoiser(_pairwise(begin))


@dataclass(frozen=True, kw_only=True)
class GuidanceRescale(Optimization):
    """Bring the guided velocity back to the spread of the conditional one, against over-exposure at high scales.

    Source: arXiv:2305.08891.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "nothing"
    per_call = True
    guidance_rescale: float = option(0.0, "share of the rescaled velocity, 0 to 1; the authors use 0.7")

    def check(self, hardware: Hardware) -> None:
        if not 0 <= self.guidance_rescale <= 1:
            raise BadRequest(f"--guidance_rescale {self.guidance_rescale!r} is a share: give 0 to 1")

    def apply(self, engine: Engine) -> None:
        def rescale(guided: Tensor, velocities: Mapping[str, Tensor], latents: Tensor, step: Step) -> Tensor:
            if len(velocities) < 2 or "cond" not in velocities:
                return guided
            return rescaled(guided, velocities["cond"], self.guidance_rescale)

        engine.add_post(rescale)


def _pairwise(begin: Callable[[], Pair]) -> Callable[[Denoiser, nn.Module, Segment], Denoiser]:
    """Denoisers whose "cond" and "uncond" are changed together; what `begin()` keeps lives for one segment."""

    def wrap(denoiser: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
        change = begin()

        def changed(latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
            velocities = denoiser(latents, step, branches)
            if {"cond", "uncond"} <= velocities.keys():
                cond, uncond = change(velocities["cond"], velocities["uncond"])
                velocities = velocities | {"cond": cond, "uncond": uncond}
            return velocities

        return changed

    return wrap


@dataclass
class _Still:
    """A denoiser that leaves the noise as it is in the first `steps` steps, without a forward."""

    denoiser: Denoiser
    steps: int

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        if step.index < self.steps:
            return dict.fromkeys(branches, torch.zeros_like(latents))
        return self.denoiser(latents, step, branches)
