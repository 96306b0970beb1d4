"""Scripts written for upstream's scheduler classes get upstream's timesteps, noise levels and samples."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wan.engine.sampling.schedule import flow_steps
from wan.engine.sampling.solvers import make_solver
from wan.utils.fm_solvers import FlowDPMSolverMultistepScheduler, get_sampling_sigmas, retrieve_timesteps
from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

RECORDED = Path(__file__).parents[1] / "data" / "golden"
SHARED_DEFAULTS = {
    "num_train_timesteps": 1000, "solver_order": 2, "prediction_type": "flow_prediction", "shift": 1.0,
    "use_dynamic_shifting": False, "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0,
}  # fmt: skip


def network(latents: Tensor, t: Tensor) -> Tensor:
    """The velocity field of the recorded runs."""
    w = torch.linspace(-1, 1, latents.numel()).view_as(latents)
    return 0.8 * torch.tanh(latents) + w * (0.3 + t / 1000) - 0.1 * latents


def prepared(solver: str, steps: int, shift: float) -> Any:
    """A scheduler set up as upstream's pipelines do."""
    if solver == "unipc":
        scheduler = FlowUniPCMultistepScheduler(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
        scheduler.set_timesteps(steps, device="cpu", shift=shift)
    else:
        scheduler = FlowDPMSolverMultistepScheduler(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
        timesteps, count = retrieve_timesteps(scheduler, device="cpu", sigmas=get_sampling_sigmas(steps, shift))
        assert timesteps is scheduler.timesteps
        assert count == steps
    return scheduler


def run(scheduler: Any, latents: Tensor) -> list[Tensor]:
    seen = []
    for t in scheduler.timesteps:
        latents = scheduler.step(network(latents, t), t, latents, return_dict=False)[0]
        seen.append(latents)
    return seen


@pytest.mark.parametrize(("solver", "file"), [("unipc", "unipc"), ("dpm++", "dpmpp")])
def test_schedulers_equal_upstream(solver: str, file: str) -> None:
    """Timesteps and noise levels to the last bit; samples within 1e-5, as CPUs differ in tanh."""
    recorded = load_file(RECORDED / f"{file}.safetensors")
    cases = [key.removesuffix(".t") for key in recorded if key.endswith(".t")]
    assert len(cases) == 6
    for case in cases:
        steps, shift = case.split("@")
        scheduler = prepared(solver, int(steps), float(shift))
        assert scheduler.timesteps.dtype == torch.int64
        assert torch.equal(scheduler.timesteps, recorded[f"{case}.t"])
        assert torch.equal(scheduler.sigmas, recorded[f"{case}.sigmas"])
        seen = run(scheduler, recorded["x_init"])
        expected = [recorded[f"{case}.x.{i}"] for i in range(len(seen)) if f"{case}.x.{i}" in recorded]
        if len(expected) < len(seen):  # long runs were recorded by their last sample
            seen = seen[-1:]
        for ours, theirs in zip(seen, expected, strict=True):
            assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_schedulers_equal_the_engines_solvers_to_the_last_bit(solver: str) -> None:
    steps = flow_steps(solver, 12, 5.0)
    ours, latents = make_solver(solver, steps), torch.randn(1, 4, 2, 3, 5)
    for step, expected in zip(steps, run(prepared(solver, 12, 5.0), latents), strict=True):
        latents = ours.step(network(latents, torch.tensor(int(step.t))), step, latents)
        assert torch.equal(latents, expected)


@pytest.mark.parametrize(("steps", "shift"), [(80, 16.0), (100, 12.0), (50, 25.0)])
def test_equal_integer_timesteps_do_no_harm(steps: int, shift: float) -> None:
    scheduler = prepared("unipc", steps, shift)
    assert len(scheduler.timesteps.unique()) < steps
    assert run(scheduler, torch.randn(1, 4, 2, 3, 5))[-1].isfinite().all()
    assert scheduler.step_index == steps


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_scheduler_can_be_used_again(solver: str) -> None:
    scheduler, start = prepared(solver, 6, 5.0), torch.randn(1, 4, 2, 3, 5)
    first = run(scheduler, start)[-1]
    if solver == "unipc":
        scheduler.set_timesteps(6, device="cpu", shift=5.0)
    else:
        scheduler.set_timesteps(sigmas=get_sampling_sigmas(6, 5.0))
    assert torch.equal(run(scheduler, start)[-1], first)


@pytest.mark.parametrize("kind", [FlowUniPCMultistepScheduler, FlowDPMSolverMultistepScheduler])
def test_constructors_take_upstreams_arguments_in_upstreams_order(kind: Any) -> None:
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {name: p.default for name, p in list(parameters.items())[1:]}
    assert list(defaults.items())[: len(SHARED_DEFAULTS)] == list(SHARED_DEFAULTS.items())
    assert len(defaults) == 16
    scheduler = kind(1000, 2, "flow_prediction", 3.0)
    assert scheduler.config.shift == 3.0
    assert kind.from_config(scheduler.config).config.shift == 3.0
    assert len(scheduler) == 1000
    assert scheduler.order == 1
    assert scheduler.init_noise_sigma == 1.0


def test_step_arguments_have_upstreams_order() -> None:
    def names(kind: Any) -> list[str]:
        return list(inspect.signature(kind.step).parameters)[1:]

    common = ["model_output", "timestep", "sample"]
    assert names(FlowUniPCMultistepScheduler) == [*common, "return_dict", "generator"]
    assert names(FlowDPMSolverMultistepScheduler) == [*common, "generator", "variance_noise", "return_dict"]


@pytest.mark.parametrize("kind", [FlowUniPCMultistepScheduler, FlowDPMSolverMultistepScheduler])
def test_step_returns_an_output_object_unless_told_otherwise(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(3, device="cpu", shift=5.0)
    start = torch.randn(1, 4, 2, 2, 2)
    out = scheduler.step(torch.zeros_like(start), scheduler.timesteps[0], start, generator=torch.Generator())
    assert out.prev_sample.shape == start.shape
    assert torch.equal(scheduler.scale_model_input(start), start)


@pytest.mark.parametrize("kind", [FlowUniPCMultistepScheduler, FlowDPMSolverMultistepScheduler])
def test_noise_is_added_by_the_noise_level_of_the_timestep(kind: Any) -> None:
    scheduler = kind()
    scheduler.set_timesteps(5, device="cpu", shift=5.0)
    image, noise = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 4, 2, 2, 2)
    sigma = scheduler.sigmas[[2, 4]].view(2, 1, 1, 1, 1)
    noisy = scheduler.add_noise(image, noise, scheduler.timesteps[[2, 4]])
    assert torch.equal(noisy, (1 - sigma) * image + sigma * noise)


def test_a_run_can_start_in_the_middle() -> None:
    """As in video to video: the first step finds its place by the timestep."""
    scheduler = prepared("unipc", 6, 5.0)
    latents = torch.randn(1, 4, 2, 2, 2)
    for t in scheduler.timesteps[3:]:
        latents = scheduler.step(network(latents, t), t, latents).prev_sample
    assert scheduler.step_index == 6
    assert latents.isfinite().all()


@pytest.mark.parametrize("kind", [FlowUniPCMultistepScheduler, FlowDPMSolverMultistepScheduler])
def test_dynamic_shifting_needs_mu_and_equals_a_shift_of_its_exponential(kind: Any) -> None:
    scheduler = kind(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu"):
        scheduler.set_timesteps(4)
    scheduler.set_timesteps(4, mu=float(np.log(5.0)))
    plain = kind()
    plain.set_timesteps(4, shift=5.0)
    torch.testing.assert_close(scheduler.sigmas, plain.sigmas, rtol=1e-6, atol=0)  # log and exp round


def test_wrong_timesteps_are_refused() -> None:
    scheduler = prepared("unipc", 4, 5.0)
    with pytest.raises(ValueError, match="timestep 123"):
        scheduler.step(torch.zeros(1, 1, 1, 1, 1), 123, torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="both timesteps and sigmas"):
        retrieve_timesteps(scheduler, timesteps=[1], sigmas=[1.0])
    with pytest.raises(ValueError, match="does not take timesteps"):
        retrieve_timesteps(scheduler, timesteps=[1])


def test_sampling_sigmas_start_at_one_and_leave_out_zero() -> None:
    sigmas = get_sampling_sigmas(4, 5.0)
    assert sigmas.dtype == np.float64
    assert sigmas.tolist() == [1.0, 0.9375, 5 * 0.5 / 3, 0.625]
    assert retrieve_timesteps(FlowUniPCMultistepScheduler(), 4, "cpu", shift=5.0)[0].tolist() == [999, 937, 833, 624]
