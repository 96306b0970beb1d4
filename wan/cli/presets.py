"""Run presets: flat TOML files whose keys are option names, and the plan a command line makes from them."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wan.cli.args import PROGRAM_DEFAULTS
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.plan import Optimization, Plan, options
from wan.resources import folder

# `auto` looks for the first of these that says the card's name, and else takes cpu or auto.
_CARDS = (("H100", "h100"),)


def make_plan(
    args: argparse.Namespace, registry: Sequence[type[Optimization]], hardware: Hardware, default: str
) -> Plan:
    """How to run: option default < what the command line always chooses < preset < flag, each with its reason.

    Raises IncompatibleOptions or BadRequest before anything is loaded.
    """
    known = {o.name: o for o in options(registry)}
    here = chosen_here(known, hardware.world_size)
    values = {name: value for name, (value, _) in here.items()}
    reasons = {name: why for name, (_, why) in here.items()}
    name, wanted = (args.preset, "flag") if args.preset is not None else (default, "default")
    path = find_preset(name, hardware)
    if path is not None:
        preset = read_preset(path)
        Plan.of(registry, preset, source=f"preset {path.name}")
        why = f"preset {path.stem}" + (f", {wanted} {name}" if name == "auto" else "")
        values |= preset
        reasons |= dict.fromkeys(preset, why)
    flags = {o: getattr(args, o) for o in known if getattr(args, o) is not None}
    plan = Plan.of(registry, values | flags, source="flag", reasons=reasons | dict.fromkeys(flags, "flag"))
    plan.check(hardware)
    return plan


def find_preset(name: str, hardware: Hardware) -> Path | None:
    """The file of preset `name` (a name in configs/, a path, `auto`); None for `none`. Raises BadRequest."""
    if name == "none":
        return None
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise BadRequest(f"--preset {name!r}: there is no such file")
        return Path(name)
    try:
        places = folder("configs")
    except FileNotFoundError as error:
        raise BadRequest(f"--preset {name!r}: {error}; --preset FILE.toml still works") from error
    path = places / f"{_by_hardware(places, hardware) if name == 'auto' else name}.toml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in places.glob("*.toml")))
        raise BadRequest(f"--preset {name!r} is unknown: use none, auto, {there}, or a FILE.toml")
    return path


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


def _by_hardware(places: Path, hardware: Hardware) -> str:
    if not hardware.is_cuda:
        return "cpu"
    named = (preset for card, preset in _CARDS if card in hardware.name and (places / f"{preset}.toml").is_file())
    return next(named, "auto")


def chosen_here(known: Iterable[str], world_size: int) -> dict[str, tuple[Any, str]]:
    """Option -> (value, why) of what the program chooses where the library leaves a default, as upstream's does."""
    always: dict[str, tuple[Any, str]] = {name: (value, "default") for name, value in PROGRAM_DEFAULTS.items()}
    always["offload_model"] = (world_size == 1, "one process" if world_size == 1 else "several processes")
    return {name: entry for name, entry in always.items() if name in known}


def refuse_several_processes(registry: Sequence[type[Optimization]], world_size: int) -> None:
    """Raise IncompatibleOptions when torchrun started several processes and nothing here can share the work."""
    sharing = {"ulysses_size", "ring_size", "dit_fsdp", "t5_fsdp"}
    if world_size > 1 and not sharing & {o.name for o in options(registry)}:
        raise IncompatibleOptions(
            f"WORLD_SIZE is {world_size}, but this version runs in one process: start it with python generate.py, "
            "without torchrun"
        )
