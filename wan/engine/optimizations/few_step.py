"""Few steps in place of many, for models and LoRAs that were distilled for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.given_loras import parsed
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order, Plan
from wan.engine.sampling.noise import fresh_noise
from wan.engine.sampling.phases import recipe_solver, recipe_steps
from wan.engine.sampling.recipes import Phase, Recipe, recipe_named
from wan.engine.sampling.solvers import Solver
from wan.engine.types import Coefficients, Step
from wan.engine.weights.lora import open_lora
from wan.resources import folder

if TYPE_CHECKING:
    from wan.engine.engine import Engine
    from wan.engine.running import Job

LORAS = ("lora", "lora_high", "lora_low")


@dataclass(frozen=True, kw_only=True)
class FewStep(Optimization):
    """Sample by a recipe: its noise levels, experts, guidance, LoRA strengths and solvers, in place of the task's.

    A recipe goes with weights that were distilled for exactly its steps; one that wants a LoRA says which and is
    refused without. Most of the published ones run 3 to 9 forwards where a task has 80 to 100; what is lost of the
    picture, and of motion most of all, is the distillation's. A file describes any other sequence of phases.
    docs/few-step.md lists recipes, sources and the keys of a file.
    """

    order = Order.SCHEDULE
    grade = "lossy"
    tolerance = 3.0
    cost = "nothing: it saves most steps"
    per_call = True
    conflicts = (Conflict("StepCache", "steps as far apart as those of a recipe have nothing to reuse"),)
    few_step: str | None = option(None, "sample by this recipe: a name (docs/few-step.md) or FILE.toml; off is without")
    few_step_distilled: bool = option(
        False, "the checkpoint itself was distilled, no LoRA is needed; known by itself where its name says so"
    )

    @property
    def recipe(self) -> Recipe:
        """What it samples by, where it is on. Raises BadRequest."""
        assert self.few_step is not None, "it is switched on"
        return recipe_named(self.few_step)

    def brings(self) -> Mapping[str, Any]:
        try:
            recipe = self.recipe
        except BadRequest:  # which `check` raises where it is to be told
            return {}
        shipped = {name: (str(folder("demo") / path),) for name, path in recipe.ships.items()}
        return shipped | ({"lora_mode": "onthefly"} if recipe.varies_loras else {})

    def absolute(self) -> Mapping[str, Any]:
        is_file = self.few_step is not None and self.few_step.endswith(".toml")
        return {"few_step": str(Path(self.few_step or "").expanduser().absolute())} if is_file else {}

    @property
    def file(self) -> Path | None:
        """The recipe's file, where it is the user's own."""
        return Path(path) if (path := self.absolute().get("few_step")) else None

    def check(self, hardware: Hardware) -> None:
        self.recipe  # noqa: B018 (raises what is wrong with it)

    def check_plan(self, plan: Plan) -> None:
        recipe, values = self.recipe, plan.values()
        loras = {name: values.get(name, ()) for name in LORAS}
        lacking = [f"--lora_{name}" for name in recipe.needs if not (loras["lora"] or loras[f"lora_{name}"])]
        if lacking and not self.few_step_distilled:
            raise IncompatibleOptions(
                f"--few_step {self.few_step} needs weights that were distilled for it: pass its LoRA with --lora, or "
                f"{' and '.join(lacking)} of two experts; it is published as {recipe.files}. Say "
                "--few_step_distilled where the checkpoint itself was distilled"
            )
        if recipe.varies_loras:
            self._check_strengths(recipe, values, loras)
        if recipe.alpha is not None:
            self._tell_missing_alpha(recipe.alpha, loras)

    def apply(self, engine: Engine) -> None:
        recipe = self.recipe
        engine.sample_by(partial(sampled, recipe, engine.expert_names))
        engine.wrap_coefficients(partial(guided, recipe.phases))

    def _check_strengths(self, recipe: Recipe, values: Mapping[str, Any], loras: Mapping[str, tuple[str, ...]]) -> None:
        """Whether strengths that change from phase to phase can be had of these LoRAs."""
        flag = f"--few_step {self.few_step}"
        if values.get("lora_mode") == "merge" and any(loras.values()):
            raise IncompatibleOptions(
                f"--lora_mode merge and {flag} do not go together: its phases have LoRAs at other strengths, and what "
                "is merged acts in every step; use --lora_mode onthefly"
            )
        if values.get("context_frames"):
            raise IncompatibleOptions(
                f"--context_frames and {flag} do not go together: windows remember what LoRAs make of the text, and "
                "its phases have them at other strengths; leave lora out of its phases"
            )
        for number, phase in enumerate(recipe.phases, 1):
            experts = (phase.expert,) if phase.expert else ("high", "low")
            counts = {len(loras["lora"]) + len(loras[f"lora_{expert}"]) for expert in experts}
            if len(phase.lora) > 1 and counts != {len(phase.lora)}:
                raise IncompatibleOptions(
                    f"{flag}: phase {number}: lora has {len(phase.lora)} factors, and {' or '.join(map(str, counts))} "
                    "LoRAs change its expert: give one for each, or one for all"
                )

    def _tell_missing_alpha(self, alpha: float, loras: Mapping[str, tuple[str, ...]]) -> None:
        """A copy that lost its alpha may be too strong by rank / alpha; whether it was folded in, no file says."""
        for path in [parsed(text, f"--{name}").path for name, texts in loras.items() for text in texts]:
            if not open_lora(path).has_alpha:
                logging.getLogger(__name__).info(
                    "LoRA %s has no alpha; those of %s were published with alpha %g at rank 64: if it is not "
                    "folded in, give FILE:%g", path.name, self.few_step, alpha, alpha / 64,
                )  # fmt: skip


def sampled(recipe: Recipe, experts: tuple[str, ...], job: Job, shot: int) -> tuple[tuple[Step, ...], Solver]:
    """The steps of a shot and their solver."""
    steps = recipe_steps(recipe, experts, job.config.get("boundary"), job.request.shift)
    return steps, recipe_solver(recipe, steps, partial(fresh_noise, job.request, shot))


def guided(phases: tuple[Phase, ...], coefficients: Coefficients) -> Coefficients:
    """`coefficients` with the guidance scale of each phase; of two branches, with and without the prompt."""

    def chosen(step: Step) -> dict[str, float]:
        scale = phases[step.phase].guidance
        if coefficients(step).keys() != {"uncond", "cond"}:
            raise IncompatibleOptions("--few_step and a task whose guidance has other branches do not go together")
        return {"uncond": 1 - scale, "cond": scale}

    return chosen
