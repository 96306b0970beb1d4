"""A recipe at work: the steps of its phases, and a solver for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from wan.engine.sampling.recipes import RENOISE, Recipe
from wan.engine.sampling.schedule import noise_schedule
from wan.engine.sampling.solvers import Solver, make_solver
from wan.engine.types import Step

FreshNoise = Callable[[Step, Tensor], Tensor]
"""(step, latents) -> noise of the same shape, the same whenever it is asked for a step."""


def recipe_steps(recipe: Recipe, experts: Sequence[str], boundary: float | None, shift: float) -> tuple[Step, ...]:
    """The steps of `recipe` on a model with these experts.

    A phase without an expert takes the one that `boundary`, a noise level, gives its steps to; a model of one expert
    takes all. `shift` acts where the recipe has none of its own.
    """
    if recipe.has_levels:
        sigmas = [sigma for phase in recipe.phases for sigma in phase.sigmas] + [0.0]
        timesteps = [1000 * sigma for sigma in sigmas[:-1]]
    else:
        first = recipe.phases[0].solver
        spacing = "euler" if first == RENOISE else first
        timesteps, sigmas = noise_schedule(spacing, recipe.steps, recipe.shift or shift)
    phases = [(number, phase) for number, phase in enumerate(recipe.phases) for _ in range(phase.steps)]
    steps = []
    for index, ((number, phase), t, (now, after)) in enumerate(zip(phases, timesteps, pairwise(sigmas), strict=True)):
        named = phase.expert or ("high" if boundary is not None and t >= 1000 * boundary else "low")
        expert = named if len(experts) > 1 else experts[0]
        steps.append(Step(index, recipe.steps, t, now, after, expert, number, lora=phase.lora))
    return tuple(steps)


def recipe_solver(recipe: Recipe, steps: tuple[Step, ...], fresh: FreshNoise) -> Phased:
    """A new solver for `steps`, one run long."""
    solvers: dict[int, Solver] = {}
    for number, phase in enumerate(recipe.phases):
        mine = tuple(step for step in steps if step.phase == number)
        solvers[number] = Renoise(fresh) if phase.solver == RENOISE else make_solver(phase.solver, mine)
    return Phased(solvers)


class Phased:
    """Each phase's own solver; a new phase begins without a history."""

    def __init__(self, solvers: Mapping[int, Solver]) -> None:
        self.solvers = solvers
        self._phase = 0

    def step(self, velocity: Tensor, step: Step, latents: Tensor) -> Tensor:
        self._phase = step.phase
        return self.solvers[step.phase].step(velocity, step, latents)

    def state(self) -> dict[str, Tensor]:
        return {f"{self._phase}.{key}": value for key, value in self.solvers[self._phase].state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for number, solver in self.solvers.items():
            mine = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{number}.")}
            if mine:
                self._phase = number
                solver.load(mine)


class Renoise:
    """Predict x0 and noise it again for the next step, with noise that was not there before.

    Source: the multi-step generator of DMD2, arXiv:2405.14867.
    """

    def __init__(self, fresh: FreshNoise) -> None:
        self.fresh = fresh

    def step(self, velocity: Tensor, step: Step, latents: Tensor) -> Tensor:
        x0 = latents - step.sigma * velocity
        if step.sigma_next > 0:
            x0 = (1 - step.sigma_next) * x0 + step.sigma_next * self.fresh(step, latents)
        return x0.to(latents.dtype)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over: the noise of a step is known by its number."""
