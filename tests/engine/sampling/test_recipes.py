"""Recipes: published noise levels from the formulas behind them, phases at work, and what a bad file is told."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.engine.sampling.loop import sample
from wan.engine.sampling.noise import fresh_noise
from wan.engine.sampling.phases import Renoise, recipe_solver, recipe_steps
from wan.engine.sampling.recipes import Recipe, is_distilled, published, recipe_named
from wan.engine.types import Request, Step

TWO = ("high", "low")
REQUEST = Request(
    task="t2v-A14B", prompt="", negative_prompt="", height=16, width=16, num_frames=1, steps=40, shift=5.0,
    solver="unipc", guide_scale=(3.0, 4.0), seed=7,
)  # fmt: skip
SHAPE = (1, 4, 2, 3, 3)


def steps_of(recipe: Recipe, experts: Sequence[str] = TWO) -> tuple[Step, ...]:
    return recipe_steps(recipe, experts, 0.875, 5.0)


def lightx2v_levels(entries: Sequence[int], shift: float = 5.0) -> list[float]:
    """By LightX2V's rule: the entries count down a grid of 1000 noise levels, which is shifted."""
    grid = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    shifted = shift * grid / (1 + (shift - 1) * grid)
    return [float(shifted[1000 - entry]) for entry in entries]


GOLDEN = {
    "lightx2v-4step": lightx2v_levels([1000, 750, 500, 250]),
    "lightning-4step": lightx2v_levels([1000, 750, 500, 250]),
    "demo-4step": lightx2v_levels([1000, 750, 500, 250]),
    # As the authors give them, to four decimals of a timestep.
    "lightning-8step": [
        t / 1000 for t in (1000, 972.2224, 937.5001, 892.8571, 833.3333, 750.0001, 625, 416.6667)
    ],
    "causvid-9step": [t / 1000 for t in (999, 934, 862, 756, 603, 410, 250, 140, 74)],
    "fastwan-3step": [t / 1000 for t in (1000, 757, 522)],
    "lightx2v-motion": [(s := i / 20) * 5 / (1 + 4 * s) for i in range(20, 0, -1)],
    # UniPC begins a thousandth below pure noise.
    "fusionx-8step": [(s := 0.999 * i / 8) * 5 / (1 + 4 * s) for i in range(8, 0, -1)],
}  # fmt: skip


def test_every_recipe_has_golden_levels() -> None:
    assert GOLDEN.keys() == published().keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_published_noise_levels_are_those_of_their_formula(name: str) -> None:
    recipe = recipe_named(name)
    steps = steps_of(recipe)
    assert [step.sigma for step in steps] == pytest.approx(GOLDEN[name], abs=1e-6)
    assert [step.sigma_next for step in steps] == pytest.approx([*GOLDEN[name][1:], 0.0], abs=1e-6)
    whole = recipe.phases[0].solver == "unipc"  # as upstream's solver has it; distilled weights know fractions
    told = [float(int(1000 * sigma)) if whole else 1000 * sigma for sigma in GOLDEN[name]]
    assert [step.t for step in steps] == pytest.approx(told, abs=1.01 if whole else 1e-3)


def test_experts_change_where_the_recipe_says_and_a_model_of_one_takes_all_steps() -> None:
    experts = [step.expert for step in steps_of(recipe_named("lightx2v-4step"))]
    assert experts == ["high", "high", "low", "low"]
    assert {step.expert for step in steps_of(recipe_named("lightx2v-4step"), ("dit",))} == {"dit"}
    # Nothing said: by the boundary, at 0.875.
    assert [step.expert for step in steps_of(recipe_named("causvid-9step"))] == ["high"] * 2 + ["low"] * 7


def test_a_file_describes_any_phases(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'shift = 8\n[[phase]]\nexpert = "high"\nsteps = 2\nguidance = 3.5\nlora = 0\nsolver = "unipc"\n'
        '[[phase]]\nexpert = "low"\nsteps = 3\nlora = [0.5, 1]\nsolver = "renoise"\n'
    )
    recipe = recipe_named(str(file))
    steps = steps_of(recipe)
    assert [step.sigma for step in steps] == pytest.approx(
        [(s := 0.999 * i / 5) * 8 / (1 + 7 * s) for i in range(5, 0, -1)], abs=1e-6
    )
    assert [(step.phase, step.expert, step.lora) for step in steps] == [(0, "high", (0.0,))] * 2 + [
        (1, "low", (0.5, 1.0))
    ] * 3
    assert (recipe.steps, recipe.forwards, recipe.varies_loras) == (5, 7, True)
    assert [steps[-1].lora_factor(i) for i in (0, 1)] == [0.5, 1.0] and steps[0].lora_factor(1) == 0


SIGMAS = "sigmas = [0.9, 0.5]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "phase is missing"),
        ("phase = []", r"phase = \[\]"),
        ("phase = [3]", "phase 1 = 3"),
        ("[[phase]]\nguidance = 1", "steps or sigmas, not neither"),
        ("[[phase]]\nsteps = 2\n" + SIGMAS, "steps or sigmas, not both"),
        ("[[phase]]\nsteps = 0", "phase 1: steps = 0: give 1 or more"),
        ("[[phase]]\nsteps = true", "steps = True"),
        ("[[phase]]\nsigmas = []", r"sigmas = \[\]"),
        ("[[phase]]\nsigmas = [937.5]", r"sigmas = \[937.5\]: .* at most 1"),
        ("[[phase]]\nsigmas = [0.5, 0.5]", "sigmas = 0.5 comes after 0.5"),
        (f"[[phase]]\n{SIGMAS}\n[[phase]]\nsigmas = [0.6]", "sigmas = 0.6 comes after 0.5"),
        (f"[[phase]]\n{SIGMAS}\n[[phase]]\nsteps = 2", "sigmas in every phase or steps in every phase"),
        (f"shift = 3\n[[phase]]\n{SIGMAS}", "shift = 3 has no effect"),
        (f"[[phase]]\n{SIGMAS}\n[[phase]]\nsigmas = [0.1]\nsolver = 'lcm'", "phase 2: solver = 'lcm': give one of"),
        ("[[phase]]\nsigmas = [1.0]\nsolver = 'unipc'", "solver = 'unipc' must start below noise level 1"),
        (f"[[phase]]\n{SIGMAS}\nsample_solvers = 'euler'", "no key is called 'sample_solvers'; known: expert, steps"),
        (f"[[phase]]\n{SIGMAS}\nguidance = 'off'", "guidance = 'off': give a number"),
        (f"[[phase]]\n{SIGMAS}\nlora = ['a']", r"lora = \['a'\]"),
        (f"[[phase]]\n{SIGMAS}\nexpert = 'middle'", "expert = 'middle'"),
        (f"needs = ['all']\n[[phase]]\n{SIGMAS}", r"needs = \['all'\]"),
        (f"shift = -1\n[[phase]]\n{SIGMAS}", "shift = -1"),
        ("[[phase]", "cannot be read"),
    ],
)
def test_a_bad_file_is_told_key_and_value(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(BadRequest, match=said) as caught:
        recipe_named(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_are_known_to_be_distilled_by_their_names() -> None:
    assert is_distilled([None, "/data/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v"])
    assert is_distilled([Path("wan2.2_t2v_A14b_high_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors")])
    assert is_distilled(["FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers"])
    assert not is_distilled([None, "Wan-AI/Wan2.2-T2V-A14B", Path("high_noise_model")])


# Solvers of phases ---------------------------------------------------------------------------------------------------


def network(latents: Tensor, step: Step) -> Tensor:
    return torch.sin(3 * latents) + step.t / 1000


def test_noising_again_keeps_the_prediction_and_none_of_the_noise() -> None:
    """x' = (1 - s') (x - s v) + s' e, written as a mean of two terms; the last step is the prediction alone."""
    steps = steps_of(recipe_named("fastwan-3step"))
    fresh = partial(fresh_noise, REQUEST, 0)
    latents, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    for step in steps:
        found = Renoise(fresh).step(velocity, step, latents)
        predicted = latents.double() - step.sigma * velocity.double()
        noise = torch.zeros(SHAPE) if step.sigma_next == 0 else fresh(step, latents)
        wanted = predicted + step.sigma_next * (noise - predicted)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)  # float32 arithmetic


def test_fresh_noise_is_the_same_for_a_step_and_another_for_every_other() -> None:
    steps, like = steps_of(recipe_named("fastwan-3step")), torch.zeros(1, 8, 4, 16, 16)
    first = fresh_noise(REQUEST, 0, steps[0], like)
    assert torch.equal(fresh_noise(REQUEST, 0, steps[0], like), first)
    assert abs(float(first.mean())) < 0.05 and abs(float(first.std()) - 1) < 0.05  # of 8192 samples
    for other in (fresh_noise(REQUEST, 1, steps[0], like), fresh_noise(REQUEST, 0, steps[1], like)):
        assert abs(float((first * other).mean())) < 0.05


def test_a_run_of_phases_stopped_after_any_step_continues_bit_by_bit(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("".join(f"[[phase]]\nsteps = 3\nsolver = '{name}'\n" for name in ("unipc", "renoise", "dpm++")))
    recipe, start = recipe_named(str(file)), torch.randn(SHAPE)
    steps, fresh = steps_of(recipe), partial(fresh_noise, REQUEST, 0)
    assert all(now.sigma_next == after.sigma for now, after in pairwise(steps))
    whole = sample(network, recipe_solver(recipe, steps, fresh), start, steps)
    for done in range(len(steps) + 1):
        first, second = (recipe_solver(recipe, steps, fresh) for _ in range(2))
        latents = sample(network, first, start, steps[:done])
        second.load({key: value.clone() for key, value in first.state().items()})
        assert torch.equal(sample(network, second, latents, steps[done:]), whole), f"stopped after {done}"
