"""`--quality`: sets of options by how much of the picture they may cost, chosen from measurements on the demo model.

A set lies between preset and flags: what is spelled wins, and what does not go together with it is refused.
"""

from __future__ import annotations

import argparse
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from wan.engine.errors import IncompatibleOptions
from wan.engine.plan import Optimization, Plan, options, switch_flag
from wan.resources import folder

if TYPE_CHECKING:
    from wan.cli.request import Wanted

SETS = ("exact", "balanced", "fast")


def read_set(name: str) -> Mapping[str, Any]:
    """The options of a set; "exact" has none."""
    return dict(_table()[name])


def chosen(args: argparse.Namespace, flags: Collection[str]) -> dict[str, Any]:
    """What `--quality` chooses beside the options that are spelled."""
    asked = {} if args.quality is None else read_set(args.quality)
    return {name: value for name, value in asked.items() if name not in flags}


def permitted(
    args: argparse.Namespace, registry: Sequence[type[Optimization]], said: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What of a shipped preset stays, and what is left out with the reason."""
    able = {o.name for o in options(may_use(args, registry))}
    kept = {name: value for name, value in said.items() if name in able}
    return kept, tuple(f"{name}: --quality exact has nothing that is lossy" for name in said if name not in kept)


def may_use(args: argparse.Namespace, registry: Sequence[type[Optimization]]) -> list[type[Optimization]]:
    """Those that may be chosen without being asked for."""
    return [kind for kind in registry if args.quality != "exact" or kind.grade != "lossy"]


@contextmanager
def naming(args: argparse.Namespace, chosen: Mapping[str, Any]) -> Iterator[None]:
    """Says in an IncompatibleOptions what was chosen, as nobody spelled it."""
    try:
        yield
    except IncompatibleOptions as error:
        if not chosen:
            raise
        said = ", ".join(f"{name} = {value}" for name, value in chosen.items())
        raise type(error)(f"{error} (--quality {args.quality} chooses {said}; a flag wins over it)") from error


def refuse_lossy(args: argparse.Namespace, plan: Plan) -> None:
    """Raise IncompatibleOptions where `--quality exact` stands beside something lossy that is switched on."""
    for optimization in plan.enabled():
        if args.quality == "exact" and optimization.grade == "lossy":
            flag = switch_flag(type(optimization))
            raise IncompatibleOptions(f"--quality exact and {flag} do not go together: it is lossy. Drop one of them.")


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
