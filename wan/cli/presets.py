"""Run presets: flat TOML files whose keys are option names, and the plan a command line makes from them."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan.cli import quality_sets
from wan.cli.args import PROGRAM_DEFAULTS, memory
from wan.cli.cards import nearest
from wan.cli.few_step import refuse_what_it_decides, told_by_name
from wan.cli.variables import taken_from
from wan.engine.budget import gigabytes
from wan.engine.errors import BadRequest, IncompatibleOptions, MissingPackage
from wan.engine.hardware import Hardware
from wan.engine.plan import Optimization, Plan, options
from wan.resources import folder


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset: its file, how it was asked for, and where `auto` took it, why.

    `left_out` says what of it does not go with this machine or with a flag; a file of the user's keeps all.
    `reserve_vram` are the bytes it leaves to others where no flag says so.
    """

    path: Path
    wanted: str = ""
    why: str = ""
    ours: bool = True
    left_out: tuple[str, ...] = ()
    reserve_vram: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path.stem}{self.wanted}"

    def lines(self) -> list[str]:
        """What to say of it before the run."""
        left = [f"note: preset {self.path.stem} without {text}" for text in self.left_out]
        leaves = "" if self.reserve_vram is None else f", leaves {gigabytes(self.reserve_vram)} of GPU memory to others"
        return [f"preset  {self.name}{leaves}" + (f": {self.why}" if self.why else ""), *left]


def make_plan(
    args: argparse.Namespace, registry: Sequence[type[Optimization]], hardware: Hardware, default: str
) -> Plan:
    """How to run: option default < what the command line always chooses < preset < --quality < flag, with reasons.

    Raises IncompatibleOptions or BadRequest before anything is loaded.
    """
    return plan_and_preset(args, registry, hardware, default)[0]


def plan_and_preset(
    args: argparse.Namespace, registry: Sequence[type[Optimization]], hardware: Hardware, default: str
) -> tuple[Plan, Preset | None]:
    """The plan of `make_plan` and the preset in it; `default` is the preset where --preset is not spelled."""
    known = {o.name: o for o in options(registry)}
    here = chosen_here(known, hardware.world_size) | told_by_name(args)
    values = {name: value for name, (value, _) in here.items()}
    reasons = {name: why for name, (_, why) in here.items()}
    flags = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    chosen = quality_sets.chosen(args, flags)
    name, wanted = (args.preset, "flag") if args.preset is not None else (default, "default")
    preset = find_preset(name, hardware, wanted)
    if preset is not None:
        said = read_preset(preset.path)
        reserved = _reserved(said.pop("reserve_vram", None), preset.path)
        preset = replace(preset, reserve_vram=reserved if args.reserve_vram is None else None)
        Plan.of(registry, said, source=f"preset {preset.path.name}")
        if preset.ours:
            said, left_out = quality_sets.permitted(args, registry, said)
            said, more = _going_with(registry, said, values, chosen | flags, hardware)
            preset = replace(preset, left_out=(*left_out, *more))
        why = comments(preset.path)
        values |= said
        source = f"preset {preset.name}"
        reasons |= {name: f"{source}: {why[name]}" if name in why else source for name in said}
    reasons |= {name: f"--quality {args.quality}" for name in chosen}
    reasons |= {name: taken_from(args, name) or "flag" for name in flags}
    plan = Plan.of(registry, values | chosen | flags, source="flag", reasons=reasons)
    with quality_sets.naming(args, chosen):
        plan.check(hardware)
    quality_sets.refuse_lossy(args, plan)
    refuse_what_it_decides(args, plan)
    return plan, preset


def _going_with(
    registry: Sequence[type[Optimization]],
    said: Mapping[str, Any],
    values: Mapping[str, Any],
    flags: Mapping[str, Any],
    hardware: Hardware,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What of a preset can run here beside the flags, and what is left out with the reason.

    Nobody asked for the single options of a preset, so one that cannot act is no error: a package that is missing, or
    a flag that contradicts it.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    Plan.of(registry, {**values, **flags}).check(hardware)
    for name in [o.name for o in options(registry) if o.name in said and o.name not in flags]:
        try:
            Plan.of(registry, {**values, **kept, name: said[name], **flags}).check(hardware)
        except (IncompatibleOptions, MissingPackage) as error:
            left_out.append(f"{name}: {error}")
        else:
            kept[name] = said[name]
    return kept, tuple(left_out)


def _reserved(text: Any, path: Path) -> int | None:
    """Bytes of `reserve_vram = "4GB"`, the one key that is no option of the engine's."""
    try:
        return None if text is None else memory(str(text))
    except argparse.ArgumentTypeError as error:
        raise BadRequest(f"preset {path.name}: reserve_vram = {error}") from error


def find_preset(name: str, hardware: Hardware, wanted: str = "flag") -> Preset | None:
    """Preset `name` (a name in configs/, a path, `auto`); None for `none`. Raises BadRequest.

    `wanted` says who named it.
    """
    if name == "none":
        return None
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise BadRequest(f"--preset {name!r}: there is no such file")
        return Preset(path=Path(name), ours=False)
    try:
        places = folder("configs")
    except FileNotFoundError as error:
        raise BadRequest(f"--preset {name!r}: {error}; --preset FILE.toml still works") from error
    stem, why = nearest(hardware) if name == "auto" else (name, "")
    path = places / f"{stem}.toml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in places.glob("*.toml")))
        raise BadRequest(f"--preset {name!r} is unknown: use none, auto, {there}, or a FILE.toml")
    return Preset(path=path, wanted=f", {wanted} auto" if name == "auto" else "", why=why)


def read_preset(path: Path) -> dict[str, Any]:
    """The option values in a preset file. Raises BadRequest when it is not flat TOML."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"preset {str(path)!r} cannot be read: {error}") from error
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise BadRequest(f"preset {str(path)!r}: [{nested[0]}] is a table; a preset is a flat list of option = value")
    return values


def comments(path: Path) -> Mapping[str, str]:
    """Option -> the reason on its line of a preset that `read_preset` reads; options without one are left out."""
    lines = re.finditer(
        r'^(\w+)\s*=\s*(?:"[^"]*"|[^#"\n]+)\s*#\s*(.+)$', path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {line[1]: line[2].strip() for line in lines}


def chosen_here(known: Iterable[str], world_size: int) -> dict[str, tuple[Any, str]]:
    """Option -> (value, why) of what the program chooses where the library leaves a default, as upstream's does."""
    always: dict[str, tuple[Any, str]] = {
        name: (value, "default: the fastest exact one; the classes keep to PyTorch's own")
        for name, value in PROGRAM_DEFAULTS.items()
    }
    always["offload_model"] = (world_size == 1, "default for one process" if world_size == 1 else "default for several")
    return {name: entry for name, entry in always.items() if name in known}


def refuse_several_processes(registry: Sequence[type[Optimization]], world_size: int) -> None:
    """Raise IncompatibleOptions when torchrun started several processes and nothing here can share the work."""
    sharing = {"ulysses_size", "ring_size", "dit_fsdp", "t5_fsdp"}
    if world_size > 1 and not sharing & {o.name for o in options(registry)}:
        raise IncompatibleOptions(
            f"WORLD_SIZE is {world_size}, but this version runs in one process: start it with python generate.py, "
            "without torchrun"
        )
