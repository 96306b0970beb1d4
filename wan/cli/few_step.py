"""`--few_step` on the command line: what it decides in place of other flags, and how it is told."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from wan.cli.variables import taken_from
from wan.engine.errors import BadRequest
from wan.engine.options import spelled

if TYPE_CHECKING:
    from wan.cli.request import Wanted
    from wan.engine.plan import Plan


def told_by_name(args: argparse.Namespace) -> dict[str, tuple[Any, str]]:
    """Option -> (value, why), where the name of the checkpoint says that it was distilled as a whole."""
    from wan.engine.sampling.recipes import is_distilled

    for name in ("ckpt_dir", "dit", "dit_low"):
        if is_distilled([getattr(args, name)]):
            return {"few_step_distilled": (True, f"the name in --{name}")}
    return {}


def refuse_what_it_decides(args: argparse.Namespace, plan: Plan) -> None:
    """Raise BadRequest for a flag that would be without effect beside a recipe."""
    from wan.engine.optimizations import FewStep

    few = plan.get(FewStep)
    if not few.enabled:
        return
    recipe = few.recipe
    shifted = recipe.has_levels or recipe.shift is not None
    given = spelled(args)
    for name in ("sample_steps", "sample_solver", "sample_guide_scale", *(["sample_shift"] if shifted else [])):
        if said := given[name][0] if name in given else taken_from(args, name):
            raise BadRequest(
                f"{said} contradicts --few_step {few.few_step}, which says how to sample: leave one of them out"
            )


def in_few_steps(wanted: Wanted, plan: Plan) -> str | None:
    """How a video is sampled, with its forwards beside those of the task's own schedule; None without a recipe."""
    from wan.engine.optimizations import FewStep

    few = plan.get(FewStep)
    if not few.enabled:
        return None
    scales = wanted.guide_scale if isinstance(wanted.guide_scale, tuple) else (wanted.guide_scale,)
    plain = wanted.steps * (1 if set(scales) == {1} else 2)
    recipe = few.recipe
    shift = "" if recipe.has_levels else f", shift {recipe.shift or wanted.shift:g}"
    return f"{recipe.steps} steps by {few.few_step}: {recipe}{shift}; {recipe.forwards} forwards in place of {plain}"
