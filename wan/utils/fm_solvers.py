"""Upstream's import path of the DPM++ scheduler and two schedule functions, for scripts that drive the network
themselves. The pipelines here use `wan.engine.sampling`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from wan.engine.sampling.schedule import shifted


def get_sampling_sigmas(sampling_steps: int, shift: float) -> np.ndarray:
    """Float64 noise levels [sampling_steps] of the DPM++ runs: evenly from 1 to 0 without the 0, then shifted."""
    return shifted(np.linspace(1, 0, sampling_steps + 1)[:sampling_steps], shift)


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, int | None]:
    """`scheduler.set_timesteps` with a count, timesteps or sigmas; then (its timesteps, how many)."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("both timesteps and sigmas were given: give one of them")
    custom = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    for name in custom:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__}.set_timesteps does not take {name}: use another scheduler")
    scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device, **kwargs)
    return scheduler.timesteps, len(scheduler.timesteps) if custom else num_inference_steps


class FlowSchedule:
    """Mix-in that puts upstream's noise levels into one of diffusers' multistep schedulers."""

    def _use_training_levels(self, num_train_timesteps: int, shift: float, dynamic: bool) -> None:
        levels = 1 - np.linspace(1, 1 / num_train_timesteps, num_train_timesteps)[::-1].copy()
        self.sigmas = torch.from_numpy(levels).to(torch.float32)
        if not dynamic:
            self.sigmas = shifted(self.sigmas, shift)
        self.timesteps = self.sigmas * num_train_timesteps
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        shift: float | None = None,
    ) -> None:
        """Choose noise levels (a count, or `sigmas` before the shift) and forget the history of earlier steps.

        `timesteps` become int64 on `device`, cut down from 1000 sigma; `sigmas` float32 on the CPU with a final 0.
        """
        if sigmas is None:
            sigmas = np.linspace(self.sigma_max, self.sigma_min, num_inference_steps + 1)[:-1]
        levels = np.asarray(sigmas, dtype=np.float64)
        if not self.config.use_dynamic_shifting:
            levels = shifted(levels, self.config.shift if shift is None else shift)
        elif mu is None:
            raise ValueError(
                "use_dynamic_shifting needs mu, the logarithm of the shift: pass set_timesteps(..., mu=...)"
            )
        else:
            levels = shifted(levels, math.exp(mu))
        # Both values of final_sigmas_type end here, since the training levels end at 0.
        self.sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
        self.timesteps = torch.from_numpy(levels * self.config.num_train_timesteps).to(device=device, dtype=torch.int64)
        self.num_inference_steps = len(levels)
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0
        self._step_index = self._begin_index = None

    def index_for_timestep(self, timestep: int | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Position of `timestep`, the first one when whole timesteps coincide.

        Upstream takes the second: then 80 steps at shift 16 lose a step and end in an assertion.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (timesteps == timestep).nonzero()
        if not len(found):
            raise ValueError(f"timestep {timestep} is not one of the scheduler's: take them from scheduler.timesteps")
        return int(found[0])


class FlowDPMSolverMultistepScheduler(FlowSchedule, DPMSolverMultistepScheduler):
    """DPM-Solver++ for flow matching; equals upstream's class of this name to the last bit."""

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, solver_order: int = 2, prediction_type: str = "flow_prediction",
        shift: float = 1.0, use_dynamic_shifting: bool = False, thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint", lower_order_final: bool = True, euler_at_final: bool = False,
        final_sigmas_type: str = "zero", lambda_min_clipped: float = -float("inf"), variance_type: str | None = None,
        invert_sigmas: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            num_train_timesteps=num_train_timesteps, solver_order=solver_order, prediction_type=prediction_type,
            thresholding=thresholding, dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value, algorithm_type=algorithm_type, solver_type=solver_type,
            lower_order_final=lower_order_final, euler_at_final=euler_at_final, use_flow_sigmas=True,
            final_sigmas_type=final_sigmas_type, lambda_min_clipped=lambda_min_clipped, variance_type=variance_type,
            use_dynamic_shifting=use_dynamic_shifting,
        )  # fmt: skip
        self._use_training_levels(num_train_timesteps, shift, use_dynamic_shifting)
