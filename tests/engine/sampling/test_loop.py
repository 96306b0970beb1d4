"""The loop asks, steps, restores what is known and reports, in this order."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.engine.sampling.loop import sample
from wan.engine.sampling.schedule import flow_steps
from wan.engine.sampling.solvers import make_solver
from wan.engine.types import Known, Step


def drift(latents: Tensor, step: Step) -> Tensor:
    return 0.8 * torch.tanh(latents) + step.t / 1000


def test_observers_see_every_step_and_the_latents_after_it() -> None:
    steps = flow_steps("unipc", 5, 3.0)
    seen: list[tuple[int, Tensor]] = []
    start = torch.randn(1, 4, 2, 3, 5)
    out = sample(drift, make_solver("unipc", steps), start, steps, observe=[lambda s, x: seen.append((s.index, x))])
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[-1][1] is out
    assert not torch.equal(seen[0][1], start)


def test_known_latents_are_there_after_every_step() -> None:
    steps = flow_steps("unipc", 4, 5.0)
    given = torch.randn(1, 4, 3, 2, 2)
    mask = torch.zeros(1, 1, 3, 1, 1)
    mask[:, :, 0] = 1
    seen: list[Tensor] = []
    sample(
        drift,
        make_solver("unipc", steps),
        torch.randn(1, 4, 3, 2, 2),
        steps,
        Known(given, mask),
        [lambda s, x: seen.append(x)],
    )
    assert all(torch.equal(latents[:, :, 0], given[:, :, 0]) for latents in seen)
    assert all(not torch.equal(latents[:, :, 1], given[:, :, 1]) for latents in seen)


def test_two_segments_with_one_solver_equal_one_run() -> None:
    steps = flow_steps("unipc", 6, 5.0)
    start = torch.randn(1, 4, 2, 2, 2)
    whole = sample(drift, make_solver("unipc", steps), start, steps)
    solver = make_solver("unipc", steps)
    half = sample(drift, solver, start, steps[:3])
    assert torch.equal(sample(drift, solver, half, steps[3:]), whole)
