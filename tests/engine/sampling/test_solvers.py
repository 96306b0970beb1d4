"""Solvers equal upstream's recorded samples and diffusers' schedulers, resume exactly, never wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan.engine.errors import BadRequest
from wan.engine.sampling.loop import sample
from wan.engine.sampling.schedule import flow_steps
from wan.engine.sampling.solvers import SOLVERS, Solver, make_solver
from wan.engine.types import Step

RECORDED = Path(__file__).parents[2] / "data" / "golden"
FILES = {"unipc": "unipc", "dpm++": "dpmpp"}
SHAPE = (1, 4, 2, 3, 5)


def network(latents: Tensor, step: Step) -> Tensor:
    """The velocity field of the recorded runs."""
    w = torch.linspace(-1, 1, latents.numel()).view_as(latents)
    return 0.8 * torch.tanh(latents) + w * (0.3 + step.t / 1000) - 0.1 * latents


def recorded_cases() -> list[tuple[str, str]]:
    keys = {solver: load_file(RECORDED / f"{file}.safetensors") for solver, file in FILES.items()}
    return [(solver, key.removesuffix(".t")) for solver in FILES for key in sorted(keys[solver]) if key.endswith(".t")]


@pytest.mark.parametrize(("solver", "case"), recorded_cases())
def test_samples_equal_upstream(solver: str, case: str) -> None:
    """Tolerance 1e-5 relative: the recording may come from a CPU with another log or another linear solver."""
    recorded = load_file(RECORDED / f"{FILES[solver]}.safetensors")
    count, shift = case.split("@")
    steps = flow_steps(solver, int(count), float(shift))
    seen: list[Tensor] = []
    sample(network, make_solver(solver, steps), recorded["x_init"], steps, observe=[lambda step, x: seen.append(x)])
    expected = [recorded[f"{case}.x.{i}"] for i in range(len(steps)) if f"{case}.x.{i}" in recorded]
    if len(expected) < len(steps):  # long runs were recorded by their last sample
        seen = seen[-1:]
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)


def oracle(solver: str, steps: tuple[Step, ...]) -> Any:
    """diffusers' scheduler on our noise levels."""
    sigmas = [step.sigma for step in steps]
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1)
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        kind = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
        scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1)
        scheduler.set_timesteps(len(steps))
        scheduler.sigmas = torch.tensor([*sigmas, 0.0])
        scheduler.timesteps = torch.tensor([step.t for step in steps])
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("count", "shift"), [(1, 5.0), (2, 3.0), (3, 1.0), (14, 12.0), (50, 5.0), (80, 16.0)])
def test_every_step_equals_diffusers_to_the_last_bit(solver: str, count: int, shift: float) -> None:
    steps = flow_steps(solver, count, shift)
    ours, theirs = make_solver(solver, steps), oracle(solver, steps)
    latents = expected = torch.randn(SHAPE)
    for step in steps:
        velocity = network(latents, step)
        latents = ours.step(velocity, step, latents)
        expected = theirs.step(velocity, step.t, expected, return_dict=False)[0]
        assert torch.equal(latents, expected), f"step {step.index}"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("count", "shift"), [(80, 16.0), (100, 12.0), (50, 25.0)])
def test_equal_integer_timesteps_do_no_harm(solver: str, count: int, shift: float) -> None:
    """Upstream takes the second of two equal timesteps for its first step and runs past its end."""
    steps = flow_steps(solver, count, shift)
    if solver == "unipc":
        assert len({step.t for step in steps}) < count
    latents = sample(network, make_solver(solver, steps), torch.randn(SHAPE), steps)
    assert latents.isfinite().all()
    few = flow_steps(solver, 20, shift)
    again = sample(network, make_solver(solver, few), torch.randn(SHAPE), few)
    assert again.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_perfect_network_is_followed_to_its_image(solver: str, count: int) -> None:
    image = torch.randn(SHAPE)
    steps = flow_steps(solver, count, 5.0)

    def predict(latents: Tensor, step: Step) -> Tensor:
        return (latents - image) / step.sigma

    latents = sample(predict, make_solver(solver, steps), torch.randn(SHAPE), steps)
    torch.testing.assert_close(latents, image, rtol=1e-4, atol=1e-5)  # float32 rounding of a few dozen steps


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_stopped_after_any_step_continues_bit_by_bit(solver: str) -> None:
    steps = flow_steps(solver, 7, 5.0)
    start = torch.randn(SHAPE)
    whole = sample(network, make_solver(solver, steps), start, steps)
    for done in range(len(steps) + 1):
        first, second = make_solver(solver, steps), make_solver(solver, steps)
        latents = sample(network, first, start, steps[:done])
        second.load({key: value.clone() for key, value in first.state().items()})
        assert torch.equal(sample(network, second, latents, steps[done:]), whole), f"stopped after {done}"


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_used_solver_can_be_wound_back(solver: str) -> None:
    steps = flow_steps(solver, 5, 5.0)
    start = torch.randn(SHAPE)
    one = make_solver(solver, steps)
    latents = sample(network, one, start, steps[:2])
    kept = one.state()
    end = sample(network, one, latents, steps[2:])
    one.load(kept)
    assert torch.equal(sample(network, one, latents, steps[2:]), end)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_of_a_later_phase_start_a_new_history(solver: str) -> None:
    steps = flow_steps("unipc", 6, 5.0)[3:]
    latents = sample(network, make_solver(solver, steps), torch.randn(SHAPE), steps)
    assert latents.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("predicted", ["float32", "same"])
def test_half_precision_latents_keep_their_dtype(solver: str, dtype: torch.dtype, predicted: str) -> None:
    steps = flow_steps(solver, 6, 5.0)
    start = torch.randn(SHAPE)
    exact = sample(network, make_solver(solver, steps), start, steps)

    def predict(latents: Tensor, step: Step) -> Tensor:
        velocity = network(latents.float(), step)
        return velocity if predicted == "float32" else velocity.to(dtype)

    latents = sample(predict, make_solver(solver, steps), start.to(dtype), steps)
    assert latents.dtype == dtype
    # Six steps, each rounding to 8 bits of mantissa or better.
    torch.testing.assert_close(latents.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_are_left_as_they_were(solver: str) -> None:
    steps = flow_steps(solver, 3, 5.0)
    one = make_solver(solver, steps)
    latents = torch.randn(SHAPE)
    for step in steps:
        velocity = network(latents, step)
        before, given = latents.clone(), velocity.clone()
        after = one.step(velocity, step, latents)
        assert torch.equal(latents, before)
        assert torch.equal(velocity, given)
        latents = after


class DeviceTraffic(TorchDispatchMode):
    """Notes operations that bring something new to the "meta" device; reading from it raises by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in [*args, *(kwargs or {}).values()] if isinstance(a, Tensor)]
        if isinstance(out, Tensor) and out.is_meta and not any(a.is_meta for a in given):
            self.arrivals.append(str(func))
        return out


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_reads_from_the_device_or_copies_to_it(solver: str) -> None:
    """The meta device stands for a GPU: it has no values to read, so any wait for one would raise."""
    steps = flow_steps(solver, 5, 5.0)
    one: Solver = make_solver(solver, steps)
    latents, velocity = torch.empty(SHAPE, device="meta"), torch.empty(SHAPE, device="meta")
    with DeviceTraffic() as traffic:
        for step in steps:
            latents = one.step(velocity, step, latents)
    assert traffic.arrivals == []


def test_an_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"'ddim'.*unipc, dpm\+\+, euler"):
        make_solver("ddim", flow_steps("unipc", 2, 5.0))


def test_unipc_refuses_pure_noise_levels() -> None:
    with pytest.raises(BadRequest, match="below noise level 1"):
        make_solver("unipc", flow_steps("euler", 4, 5.0))
