"""How to go from one noise level to the next. A solver holds the history of one run, and no step of it waits for the
device: every number it multiplies with is a float of the host.

The network predicts the velocity v = noise - x0 at x = (1 - sigma) x0 + sigma noise, so x0 = x - sigma v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.engine.types import Step


class Solver(Protocol):
    """Moves latents along the steps it was made for, in their order."""

    def step(self, velocity: Tensor, step: Step, latents: Tensor) -> Tensor:
        """Latents at `step.sigma_next`, in the dtype of `latents`. Inputs are [B, C, T, H, W] and stay as they are."""

    def state(self) -> dict[str, Tensor]:
        """The history; a new solver that `load`s it continues bit by bit."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the history that `state` returned."""


@dataclass(frozen=True)
class Interval:
    """UniPC's numbers for the way from one noise level to the next, h long in log-SNR."""

    keep: float
    """Share of the sample that stays: sigma_next / sigma."""
    pull: float
    """Minus the weight of x0: alpha_next (e^-h - 1)."""
    ratio: float | None = None
    """The interval before, as a multiple of -h; None where the step is of first order."""
    corrector: tuple[float, float] = (0.0, 0.5)
    """Weights of the slope of x0 before this interval and of its change across it."""


class UniPC:
    """UniPC of order 2, B2(h), on x0: predict a sample, and correct it when the network has seen it.

    Own code because diffusers' `UniPCMultistepScheduler`, its equal to the last bit, copies scalars to the device and
    solves a linear system there in every step. Source: arXiv:2302.04867; `FlowUniPCMultistepScheduler` of the
    original code.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        if steps[0].sigma >= 1:
            raise BadRequest(f"unipc must start below noise level 1, not at {steps[0].sigma!r}: use euler or dpm++")
        self.first = steps[0].index
        self.intervals = _intervals([*(step.sigma for step in steps), steps[-1].sigma_next])
        self.history: dict[str, Tensor] = {}

    def step(self, velocity: Tensor, step: Step, latents: Tensor) -> Tensor:
        position = step.index - self.first
        x0 = latents - step.sigma * velocity
        sample = self._corrected(x0, self.intervals[position - 1]).to(latents.dtype) if position else latents
        ahead = self.intervals[position]
        straight = ahead.keep * sample - ahead.pull * x0
        history, prediction = {"x0": x0, "straight": straight}, straight
        if ahead.ratio is not None:
            history["slope"] = (self.history["x0"] - x0) / ahead.ratio
            prediction = straight - ahead.pull * (0.5 * history["slope"])
        self.history = history
        return prediction.to(latents.dtype)

    def _corrected(self, x0: Tensor, crossed: Interval) -> Tensor:
        """What the last step should have returned, now that x0 at its end is known."""
        before, across = crossed.corrector
        bend = across * (x0 - self.history["x0"])
        if crossed.ratio is not None:
            bend = before * self.history["slope"] + bend
        return self.history["straight"] - crossed.pull * bend

    def state(self) -> dict[str, Tensor]:
        return dict(self.history)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.history = dict(state)


def _intervals(levels: list[float]) -> list[Interval]:
    """Worked out in float32 on scalars of the CPU, operation by operation as upstream does, to get the same bits."""
    sigma = torch.tensor(levels, dtype=torch.float32, device="cpu").unbind()
    alpha = [1 - s for s in sigma]
    snr = [torch.log(a) - torch.log(s) for a, s in zip(alpha, sigma, strict=True)]
    intervals = []
    for k in range(len(levels) - 1):
        h = snr[k + 1] - snr[k]
        phi = torch.expm1(-h)
        interval = Interval(keep=float(sigma[k + 1] / sigma[k]), pull=float(alpha[k + 1] * phi))
        if 0 < k < len(levels) - 2:  # the first interval has no past, the last one leads to infinite log-SNR
            ratio = (snr[k - 1] - snr[k]) / h
            one = torch.ones_like(ratio)
            linear = phi / -h - 1
            square = linear / -h - 0.5
            system = torch.stack([one, one, ratio, one]).view(2, 2)
            before, across = torch.linalg.solve(system, torch.stack([linear / phi, square * 2 / phi])).tolist()
            interval = Interval(interval.keep, interval.pull, float(ratio), (before, across))
        intervals.append(interval)
    return intervals


class DPMSolver:
    """DPM-Solver++(2M) on diffusers' scheduler, which equals upstream's to the last bit on upstream's noise levels.

    Its scalars are tensors of the CPU, and told where to begin it looks nothing up: no step waits for the device.
    Source: arXiv:2211.01095; `FlowDPMSolverMultistepScheduler` of the original code.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.scheduler = _dpm_scheduler(steps)

    def step(self, velocity: Tensor, step: Step, latents: Tensor) -> Tensor:
        if self.scheduler.step_index is None:
            self.scheduler.set_begin_index(step.index - self.steps[0].index)
        moved: Tensor = self.scheduler.step(velocity, step.t, latents, return_dict=False)[0]
        return moved.to(latents.dtype)

    def state(self) -> dict[str, Tensor]:
        x0 = self.scheduler.model_outputs[-1]
        return {} if x0 is None else {"x0": x0}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.scheduler = _dpm_scheduler(self.steps)
        if state:
            self.scheduler.model_outputs[-1] = state["x0"]
            self.scheduler.lower_order_nums = 1


def _dpm_scheduler(steps: tuple[Step, ...]) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.sigmas = torch.tensor([*(step.sigma for step in steps), steps[-1].sigma_next], dtype=torch.float32)
    scheduler.timesteps = torch.tensor([step.t for step in steps])
    scheduler.num_inference_steps = len(steps)
    return scheduler


class Euler:
    """Euler's method, for few-step distilled weights. Has no history.

    diffusers' `FlowMatchEulerDiscreteScheduler` gives the same bits but takes a package and a counter to do so.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        """Every step says all there is to know."""

    def step(self, velocity: Tensor, step: Step, latents: Tensor) -> Tensor:
        return (latents + (step.sigma_next - step.sigma) * velocity).to(latents.dtype)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""


SOLVERS: dict[str, Callable[[tuple[Step, ...]], Solver]] = {"unipc": UniPC, "dpm++": DPMSolver, "euler": Euler}


def make_solver(name: str, steps: tuple[Step, ...]) -> Solver:
    """A new solver for `steps`, one run long. Raises BadRequest for an unknown name."""
    if name not in SOLVERS:
        raise BadRequest(f"no solver is called {name!r}: use one of {', '.join(SOLVERS)}")
    return SOLVERS[name](steps)
