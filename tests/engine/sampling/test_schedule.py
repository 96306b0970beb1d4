"""Noise levels, timesteps and experts are upstream's; steps group into one segment per expert and phase."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan.engine.errors import BadRequest
from wan.engine.sampling.schedule import SPACINGS, flow_steps, noise_schedule, segments
from wan.engine.sampling.solvers import SOLVERS

RECORDED = Path(__file__).parents[2] / "data" / "golden"


@pytest.mark.parametrize(("solver", "file"), [("unipc", "unipc"), ("dpm++", "dpmpp")])
def test_noise_levels_and_timesteps_equal_upstream_to_the_last_bit(solver: str, file: str) -> None:
    recorded = load_file(RECORDED / f"{file}.safetensors")
    cases = sorted(key.removesuffix(".t") for key in recorded if key.endswith(".t"))
    assert cases
    for case in cases:
        steps, shift = case.split("@")
        timesteps, sigmas = noise_schedule(solver, int(steps), float(shift))
        assert timesteps == recorded[f"{case}.t"].tolist()
        assert sigmas == recorded[f"{case}.sigmas"].tolist()


def test_euler_gets_exact_timesteps() -> None:
    timesteps, sigmas = noise_schedule("euler", 4, 5.0)
    assert timesteps == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert sigmas == pytest.approx([1, 0.9375, 0.8333333, 0.625, 0], abs=1e-7)


def test_every_solver_has_a_spacing() -> None:
    assert SPACINGS.keys() == SOLVERS.keys()


@pytest.mark.parametrize("solver", SPACINGS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (80, 16.0), (100, 12.0), (1000, 1.0)])
def test_noise_levels_fall_to_zero(solver: str, steps: int, shift: float) -> None:
    timesteps, sigmas = noise_schedule(solver, steps, shift)
    assert len(timesteps) == steps
    assert len(sigmas) == steps + 1
    assert all(now > after for now, after in pairwise(sigmas))
    assert sigmas[-1] == 0
    assert torch.tensor(sigmas).tolist() == sigmas  # float32 values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("heun", 4, 5.0), "'heun'.*unipc, dpm\\+\\+, euler"),
        (("unipc", 0, 5.0), "0 sampling steps"),
        (("unipc", 4, 0.0), "shift 0.0"),
        (("unipc", 4, float("nan")), "shift nan"),
        (("unipc", 4, float("inf")), "shift inf"),
        (("unipc", 4, 1e6), "smaller shift"),
        (("dpm++", 50, 1e9), "smaller shift"),
    ],
)
def test_impossible_schedules_are_refused(arguments: tuple[str, int, float], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        noise_schedule(*arguments)


def test_the_expert_is_chosen_by_the_timestep_the_network_is_told() -> None:
    steps = flow_steps("unipc", 4, 12.0, lambda t: "high" if t >= 875 else "low")
    assert [(step.t, step.expert) for step in steps] == [(999, "high"), (972, "high"), (922, "high"), (799, "low")]
    assert all(isinstance(step.t, float) for step in steps)


@pytest.mark.parametrize(("shift", "boundary", "high"), [(12.0, 875, 26), (5.0, 900, 15)])
def test_published_settings_give_the_high_noise_expert_as_many_steps_as_upstream(
    shift: float, boundary: float, high: int
) -> None:
    steps = flow_steps("unipc", 40, shift, lambda t: "high" if t >= boundary else "low")
    assert [segment.expert for segment in segments(steps)] == ["high", "low"]
    assert len(segments(steps)[0].steps) == high


def test_a_timestep_on_the_boundary_belongs_to_the_high_noise_expert() -> None:
    steps = flow_steps("euler", 8, 1.0, lambda t: "high" if t >= 875 else "low")
    assert [(step.t, step.expert) for step in steps[1:3]] == [(875, "high"), (750, "low")]


def test_steps_know_their_place_and_the_next_noise_level() -> None:
    steps = flow_steps("dpm++", 5, 3.0)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert all(step.count == 5 and step.expert == "dit" for step in steps)
    assert all(now.sigma_next == after.sigma for now, after in pairwise(steps))
    assert steps[-1].sigma_next == 0


def test_segments_split_where_expert_or_phase_changes() -> None:
    steps = list(flow_steps("unipc", 6, 5.0, lambda t: "high" if t >= 900 else "low"))
    steps[-1] = replace(steps[-1], phase=1)
    found = segments(steps)
    assert [(s.expert, s.phase, len(s.steps)) for s in found] == [("high", 0, 3), ("low", 0, 2), ("low", 1, 1)]
    assert [step for segment in found for step in segment.steps] == steps


@pytest.mark.parametrize("done", range(7))
def test_resumed_segments_keep_their_steps_and_say_where_to_start(done: int) -> None:
    steps = flow_steps("unipc", 6, 5.0, lambda t: "high" if t >= 900 else "low")
    rest = segments(steps, done)
    assert all(segment in segments(steps) or segment.start for segment in rest)
    assert [step.index for segment in rest for step in segment.steps[segment.start :]] == list(range(done, 6))
