"""Which noise levels a run visits, which timesteps the network is told, and which expert answers at each of them.

Sigma is the noise level, 1 (pure noise) to 0; the network is told t = 1000 sigma.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from wan.engine.errors import BadRequest
from wan.engine.types import Segment, Step

_SPAN = re.compile(r"(\d*\.?\d+)-(\d*\.?\d+)")


@dataclass(frozen=True)
class Spacing:
    """Noise levels fall evenly from `first` to 0 before the shift; `whole` timesteps are cut to integers."""

    first: float
    whole: bool


SPACINGS = {
    # float32(0.999), the end of upstream's training table: one ulp more or less is another schedule.
    "unipc": Spacing(first=0.9990000128746033, whole=True),
    "dpm++": Spacing(first=1.0, whole=True),
    # Few-step distilled weights were trained on exact timesteps such as 833.33.
    "euler": Spacing(first=1.0, whole=False),
}


def shifted(sigma: float, shift: float) -> float:
    """`sigma` (float or array) moved towards the noise by `shift` > 1. Source: arXiv:2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_schedule(solver: str, steps: int, shift: float) -> tuple[list[float], list[float]]:
    """`steps` timesteps and `steps` + 1 sigmas, the last one 0, as upstream gives them to `solver`.

    Sigmas are float32 values. Raises BadRequest for an unknown solver and for noise levels that would coincide.
    """
    if solver not in SPACINGS:
        raise BadRequest(f"no solver is called {solver!r}: use one of {', '.join(SPACINGS)}")
    if steps < 1:
        raise BadRequest(f"{steps!r} sampling steps: give at least 1")
    if not 0 < shift < math.inf:
        raise BadRequest(f"shift {shift!r} is not a positive number: 3 to 12 are usual")
    spacing = SPACINGS[solver]
    stride = -spacing.first / steps
    levels = [shifted(i * stride + spacing.first, shift) for i in range(steps)]
    sigmas: list[float] = torch.tensor([*levels, 0.0], dtype=torch.float32).tolist()
    if any(now <= after for now, after in pairwise(sigmas)) or sigmas[0] == 1 > spacing.first:
        raise BadRequest(f"{steps} steps at shift {shift!r} merge noise levels: use fewer steps or a smaller shift")
    timesteps = [1000 * level for level in levels]
    return [float(int(t)) if spacing.whole else t for t in timesteps], sigmas


def flow_steps(
    solver: str, steps: int, shift: float, expert: Callable[[float], str] = lambda t: "dit"
) -> tuple[Step, ...]:
    """The steps of one run; `expert` names the network for a timestep, the very value the network is told."""
    timesteps, sigmas = noise_schedule(solver, steps, shift)
    levels = zip(timesteps, pairwise(sigmas), strict=True)
    return tuple(Step(i, steps, t, now, after, expert(t)) for i, (t, (now, after)) in enumerate(levels))


def segments(steps: Sequence[Step], done: int = 0) -> list[Segment]:
    """Runs of consecutive steps with the same expert and phase, less those that the first `done` steps complete."""
    found: list[Segment] = []
    for (expert, phase), group in groupby(steps, key=lambda step: (step.expert, step.phase)):
        run = tuple(group)
        start = min(done, len(run))
        done -= start
        if start < len(run):
            found.append(Segment(expert, run, phase, start))
    return found


def in_span(step: Step, interval: tuple[float, float]) -> bool:
    """Whether `step` lies in this share of the steps of its run, from and to."""
    return interval[0] <= step.index / step.count < interval[1]


def span(flag: str, text: str | None) -> tuple[float, float]:
    """(from, to) of "0.1-0.8". Raises BadRequest."""
    found = _SPAN.fullmatch(text or "0-1")
    if found is None or not 0 <= float(found[1]) < float(found[2]) <= 1:
        raise BadRequest(f"{flag} {text!r} is not a share of the steps: give FROM-TO within 0 and 1, as 0.1-0.8")
    return float(found[1]), float(found[2])
