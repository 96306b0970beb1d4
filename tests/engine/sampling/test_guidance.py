"""Guidance runs the branches it needs, once per step, and combines them as upstream does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wan.engine.sampling.guidance import Guidance, cfg
from wan.engine.sampling.schedule import flow_steps
from wan.engine.types import Coefficients, Condition, Step

STEP = flow_steps("unipc", 4, 5.0)[0]
LATENTS = torch.zeros(1, 4, 2, 3, 5)


class Recorder:
    """A denoiser that answers with a fixed velocity per branch and notes what it was asked."""

    def __init__(self, *names: str) -> None:
        self.velocities = {name: torch.randn(LATENTS.shape) for name in names}
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        self.asked.append(tuple(branches))
        return {name: self.velocities[name] for name in branches}


def guided(denoiser: Recorder, coefficients: Coefficients) -> Guidance:
    # The order of the branches must not matter, that of the coefficients does.
    branches = {name: Condition(context=torch.zeros(1, 1, 1)) for name in reversed(denoiser.velocities)}
    return Guidance(denoiser, branches, coefficients)


@pytest.mark.parametrize("scale", [0.5, 3.0, 5.0, 7.31])
def test_cfg_equals_upstreams_formula_to_the_last_bit(scale: float) -> None:
    denoiser = Recorder("uncond", "cond")
    uncond, cond = denoiser.velocities.values()
    velocity = guided(denoiser, cfg((scale, scale)))(LATENTS, STEP)
    assert torch.equal(velocity, uncond + scale * (cond - uncond))
    assert denoiser.asked == [("uncond", "cond")]


@pytest.mark.parametrize(("scale", "branch"), [(1.0, "cond"), (1, "cond"), (0.0, "uncond")])
def test_a_branch_without_weight_is_not_run(scale: float, branch: str) -> None:
    denoiser = Recorder("uncond", "cond")
    velocity = guided(denoiser, cfg((scale, scale)))(LATENTS, STEP)
    assert torch.equal(velocity, denoiser.velocities[branch])
    assert denoiser.asked == [(branch,)]


def test_each_expert_has_its_scale_low_noise_first() -> None:
    coefficients = cfg((3.0, 4.0))
    scales = {expert: coefficients(replace(STEP, expert=expert))["cond"] for expert in ("low", "high", "dit")}
    assert scales == {"low": 3.0, "high": 4.0, "dit": 3.0}
    assert cfg((3.0, 4.0), high_expert="noisy")(replace(STEP, expert="noisy"))["cond"] == 4.0


def test_three_terms_combine_linearly() -> None:
    weights = {"null": 1 - 5.0, "image": 5.0 - 7.5, "full": 7.5}  # the form of Phantom's guidance
    denoiser = Recorder(*weights)
    velocity = guided(denoiser, lambda step: weights)(LATENTS, STEP)
    expected = sum(weight * denoiser.velocities[name].double() for name, weight in weights.items())
    torch.testing.assert_close(velocity.double(), expected, rtol=0, atol=1e-5)  # float32 rounding of terms about 10


def test_terms_stay_right_when_the_first_one_drops_out() -> None:
    weights = {"null": 0.0, "image": -1.5, "full": 2.5}
    denoiser = Recorder(*weights)
    velocity = guided(denoiser, lambda step: weights)(LATENTS, STEP)
    expected = -1.5 * denoiser.velocities["image"] + 2.5 * denoiser.velocities["full"]
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)
    assert denoiser.asked == [("image", "full")]


def test_guidance_can_be_limited_to_some_steps() -> None:
    steps = flow_steps("unipc", 4, 5.0)
    plain = cfg((5.0, 5.0))
    denoiser = Recorder("uncond", "cond")
    predict = guided(denoiser, lambda step: plain(step) if step.index < 2 else {"cond": 1.0})
    for step in steps:
        predict(LATENTS, step)
    assert denoiser.asked == [("uncond", "cond")] * 2 + [("cond",)] * 2


def test_post_functions_act_in_order_on_the_guided_velocity_and_see_every_branch() -> None:
    denoiser = Recorder("uncond", "cond")
    branches = {name: Condition(context=torch.zeros(1, 1, 1)) for name in denoiser.velocities}

    def rescale(velocity: Tensor, velocities: Mapping[str, Tensor], latents: Tensor, step: Step) -> Tensor:
        return velocity * (velocities["cond"].std() / velocity.std())

    def double(velocity: Tensor, velocities: Mapping[str, Tensor], latents: Tensor, step: Step) -> Tensor:
        return 2 * velocity

    velocity = Guidance(denoiser, branches, cfg((5.0, 5.0)), (rescale, double))(LATENTS, STEP)
    torch.testing.assert_close(velocity.std(), 2 * denoiser.velocities["cond"].std())
