"""`--quality`: sets of options by how much of the picture they may cost, chosen from measurements on the demo model.

A set lies between preset and flags: what is spelled wins, and what does not go together with it is refused.
"""

from __future__ import annotations

import argparse
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from wan.engine.errors import IncompatibleOptions
from wan.engine.plan import Optimization, Plan, switch_flag
from wan.resources import folder

if TYPE_CHECKING:
    from wan.cli.request import Wanted

SETS = ("exact", "balanced", "fast")


def read_set(name: str) -> Mapping[str, Any]:
    """The options of a set; "exact" has none."""
    return dict(_table()[name])


def lossy(registry: Sequence[type[Optimization]]) -> list[type[Optimization]]:
    """The optimisations that change more than rounding."""
    return [kind for kind in registry if kind.grade == "lossy"]


def refuse_lossy(args: argparse.Namespace, plan: Plan) -> None:
    """Raise IncompatibleOptions where `--quality exact` stands beside something lossy that is switched on."""
    if args.quality != "exact":
        return
    for optimization in plan.enabled():
        if optimization.grade == "lossy":
            flag = switch_flag(type(optimization))
            source = plan.reasons.get(flag.removeprefix("--"), "flag")
            raise IncompatibleOptions(
                f"--quality exact and {flag} ({source}) do not go together: {flag} is lossy. Drop one of them."
            )


def notes(args: argparse.Namespace, wanted: Wanted) -> tuple[str, ...]:
    """What is to be said of a set beside another checkpoint than the one it was measured on."""
    from wan.cli.checkpoint import DEMO

    if args.quality in (None, "exact") or (wanted.task == DEMO and args.ckpt_dir is None):
        return ()
    words = ["python", "benchmark_t2v.py", "--mode", "quality", "--cases", args.quality, "--task", wanted.task]
    words += [word for name in _NAMING for word in _spelled(args, name)]
    command = shlex.join([*words, "--num_prompts", "16"])
    return (f"--quality {args.quality}: loss not measured on this checkpoint; measure it with: {command}",)


_NAMING = ("ckpt_dir", "load_format", "size", "image", "first_frame", "last_frame", "prompt_file")
"""Flags that say which checkpoint and what of."""


def _spelled(args: argparse.Namespace, name: str) -> list[str]:
    value = getattr(args, name)
    return [] if value is None else [f"--{name}", str(value)]


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = (folder("configs") / "quality" / "sets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
