"""Upstream's import path of the UniPC scheduler, for scripts that drive the network themselves.

The pipelines here use `wan.engine.sampling.solvers.UniPC`: the same numbers, with nothing computed on the device
but the update itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from wan.utils.fm_solvers import FlowSchedule


class FlowUniPCMultistepScheduler(FlowSchedule, UniPCMultistepScheduler):
    """UniPC for flow matching; equals upstream's class of this name to the last bit."""

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, solver_order: int = 2, prediction_type: str = "flow_prediction",
        shift: float = 1.0, use_dynamic_shifting: bool = False, thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0, predict_x0: bool = True,
        solver_type: str = "bh2", lower_order_final: bool = True, disable_corrector: Sequence[int] = (),
        solver_p: SchedulerMixin | None = None, timestep_spacing: str = "linspace", steps_offset: int = 0,
        final_sigmas_type: str = "zero",
    ) -> None:  # fmt: skip
        super().__init__(
            num_train_timesteps=num_train_timesteps, solver_order=solver_order, prediction_type=prediction_type,
            thresholding=thresholding, dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value, predict_x0=predict_x0, solver_type=solver_type,
            lower_order_final=lower_order_final, disable_corrector=disable_corrector, solver_p=solver_p,
            use_flow_sigmas=True, timestep_spacing=timestep_spacing, steps_offset=steps_offset,
            final_sigmas_type=final_sigmas_type, use_dynamic_shifting=use_dynamic_shifting,
        )  # fmt: skip
        self._use_training_levels(num_train_timesteps, shift, use_dynamic_shifting)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.last_sample = None
        if self.solver_p:
            self.solver_p.set_timesteps(self.num_inference_steps, device=self.timesteps.device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The sample at the next noise level. `generator` is taken for upstream's callers; nothing here is random."""
        return super().step(model_output, timestep, sample, return_dict)
