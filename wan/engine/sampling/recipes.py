"""Ways to sample as data: phases of consecutive steps, each with its noise levels, expert, guidance, LoRA strengths and
solver. `recipes.toml` holds the published ones; a user's file is checked key by key before anything is loaded.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from wan.engine.errors import BadRequest
from wan.engine.sampling.solvers import SOLVERS

RENOISE = "renoise"
"""The sampling rule of models distilled by distribution matching: predict x0, noise it again. No history."""
PHASE_SOLVERS = (*SOLVERS, RENOISE)
DISTILLED_NAMES = ("*distill*", "*_4step*", "*fastwan*", "*fusionx*", "*fusionix*")
"""What checkpoints are called that were distilled as a whole and need no LoRA; case does not matter."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive steps that are taken alike.

    `sigmas` are the noise levels its steps begin at; without them the phase takes its `steps` of the shifted schedule
    that all phases share. `expert` "" is the one whose noise level it is. `lora` are factors of the LoRAs' strengths:
    none for 1, one for all of them, or one for each in the order they were given.
    """

    steps: int
    sigmas: tuple[float, ...] = ()
    expert: str = ""
    guidance: float = 1.0
    lora: tuple[float, ...] = ()
    solver: str = "euler"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole way to sample. `shift` None is the request's; `needs` are experts that want a LoRA, `files` which.

    `ships` are options and the files of the demo folder that they name; `alpha` is what the LoRAs were published with.
    """

    name: str
    phases: tuple[Phase, ...]
    shift: float | None = None
    needs: tuple[str, ...] = ()
    files: str = ""
    ships: Mapping[str, str] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def guided_steps(self) -> int:
        """Steps that take a forward without the prompt as well."""
        return sum(phase.steps for phase in self.phases if phase.guidance != 1)

    @property
    def forwards(self) -> int:
        return self.steps + self.guided_steps

    @property
    def has_levels(self) -> bool:
        """Whether the noise levels are written out, so that no shift acts."""
        return bool(self.phases[0].sigmas)

    @property
    def varies_loras(self) -> bool:
        """Whether a LoRA is anywhere weaker or stronger than it was given."""
        return any(factor != 1 for phase in self.phases for factor in phase.lora)

    def __str__(self) -> str:
        """ "2 of euler with high + 2 of euler with low, guidance 1"."""
        scales = {phase.guidance for phase in self.phases}
        parts = [
            f"{phase.steps} of {phase.solver}"
            + (f" with {phase.expert}" if phase.expert else "")
            + (f" at guidance {phase.guidance:g}" if len(scales) > 1 else "")
            for phase in self.phases
        ]
        return " + ".join(parts) + (f", guidance {scales.pop():g}" if len(scales) == 1 else "")


def recipe_named(name: str) -> Recipe:
    """The published recipe `name`, or that in FILE.toml. Raises BadRequest naming key and value."""
    source = f"--few_step {name!r}"
    if not name.endswith(".toml"):
        if name not in published():
            raise BadRequest(f"{source} is unknown: use {', '.join(published())}, or a FILE.toml (docs/few-step.md)")
        return _recipe(name, published()[name], source)
    try:
        given = tomllib.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"{source} cannot be read: {error}") from error
    return _recipe(name, given, source)


@cache
def published() -> dict[str, Any]:
    """The tables of `recipes.toml` by name."""
    return tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))


def is_distilled(names: Iterable[str | Path | None]) -> bool:
    """Whether a checkpoint that goes by these names needs no LoRA to be sampled in few steps."""
    found = [str(name).lower() for name in names if name is not None]
    return any(fnmatch(name, pattern) for name in found for pattern in DISTILLED_NAMES)


# Reading ------------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _are_experts(value: Any) -> bool:
    return isinstance(value, list) and all(each in ("high", "low") for each in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


Rule = tuple[Callable[[Any], bool], str]
"""(whether a value will do, what would)."""

_PHASE: Mapping[str, Rule] = {
    "expert": (lambda value: value in ("high", "low"), "'high' or 'low', or leave it out"),
    "steps": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "1 or more"),
    "sigmas": (
        lambda value: _are_numbers(value) and all(0 < sigma <= 1 for sigma in value),
        "a list of noise levels above 0 and at most 1",
    ),
    "guidance": (_is_number, "a number; 1 is without"),
    "lora": (lambda value: _is_number(value) or _are_numbers(value), "a factor, or a list of one for each LoRA"),
    "solver": (lambda value: value in PHASE_SOLVERS, f"one of {', '.join(PHASE_SOLVERS)}"),
}
_RECIPE: Mapping[str, Rule] = {
    "phase": (lambda value: isinstance(value, list) and bool(value), "tables, [[phase]]"),
    "shift": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "needs": (_are_experts, "a list of 'high' and 'low'"),
    "alpha": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "ships": (lambda value: isinstance(value, dict), "a table"),
    **{name: (_is_text, "a text") for name in ("about", "source", "files")},
}


def _recipe(name: str, given: Mapping[str, Any], source: str) -> Recipe:
    _check_keys(given, _RECIPE, source)
    if "phase" not in given:
        raise BadRequest(f"{source}: phase is missing: give at least one table [[phase]]")
    phases = tuple(_phase(table, f"{source}: phase {i}") for i, table in enumerate(given["phase"], 1))
    kept = {key: given[key] for key in ("shift", "files", "ships", "alpha") if key in given}
    recipe = Recipe(name=name, phases=phases, needs=tuple(given.get("needs", ())), **kept)
    _check_levels(recipe, source)
    return recipe


def _phase(given: Any, where: str) -> Phase:
    if not isinstance(given, dict):
        raise BadRequest(f"{where} = {given!r}: give a table, [[phase]]")
    _check_keys(given, _PHASE, where)
    if ("steps" in given) == ("sigmas" in given):
        raise BadRequest(f"{where}: give either steps or sigmas, not {'both' if 'steps' in given else 'neither'}")
    sigmas, lora = tuple(map(float, given.get("sigmas", ()))), given.get("lora", [])
    factors = tuple(map(float, lora if isinstance(lora, list) else [lora]))
    kept = {key: given[key] for key in ("expert", "solver") if key in given}
    return Phase(
        steps=len(sigmas) or given["steps"], sigmas=sigmas, lora=factors, guidance=float(given.get("guidance", 1)),
        **kept,
    )  # fmt: skip


def _check_keys(given: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    for key, value in given.items():
        if key not in rules:
            raise BadRequest(f"{where}: no key is called {key!r}; known: {', '.join(rules)}")
        will_do, wanted = rules[key]
        if not will_do(value):
            raise BadRequest(f"{where}: {key} = {value!r}: give {wanted}")


def _check_levels(recipe: Recipe, source: str) -> None:
    """Either every phase says its noise levels, falling all the way, or none does."""
    if any(bool(phase.sigmas) != recipe.has_levels for phase in recipe.phases):
        raise BadRequest(f"{source}: give sigmas in every phase or steps in every phase, not a mixture")
    if recipe.has_levels and recipe.shift is not None:
        raise BadRequest(f"{source}: shift = {recipe.shift:g} has no effect on sigmas: leave it out")
    for number, phase in enumerate(recipe.phases, 1):
        if phase.solver == "unipc" and phase.sigmas[:1] == (1.0,):
            raise BadRequest(f"{source}: phase {number}: solver = 'unipc' must start below noise level 1: use euler")
    levels = [sigma for phase in recipe.phases for sigma in phase.sigmas]
    for now, after in pairwise(levels):
        if now <= after:
            raise BadRequest(f"{source}: sigmas = {after:g} comes after {now:g}: noise levels must fall")
