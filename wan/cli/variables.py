"""Environment variables that stand for flags of `generate_optimized.py`, for containers and scripts that set them.

A variable is its flag spelled elsewhere: checked alike, refused alike. The flag on the command line wins, and so does
what a recorded run says. `generate.py` reads none of them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wan.engine.errors import BadRequest, WanError
from wan.engine.options import str2bool

RECORDED = ("from_", "resume", "decode")
"""Flags that name a record, which says all that a variable could."""


@dataclass(frozen=True)
class Variable:
    """One or more variables that together make the flag `dest`; `rivals` are flags that say the same otherwise.

    `beside` are pairs of a flag and what the variable makes in place of `dest` where that flag is given.
    """

    names: tuple[str, ...]
    dest: str
    read: Callable[..., Any]
    wants: str
    rivals: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _frames(text: str) -> int:
    """The most frames of the form 4n+1 that are allowed."""
    return (_count(text) - 1) // 4 * 4 + 1


def _size(width: str, height: str) -> str:
    return f"{_count(width)}*{_count(height)}"


def _mode(name: str) -> Callable[[str], str | None]:
    """Reads a switch that chooses `name`; off, it says nothing."""
    return lambda text: name if str2bool(text) else None


COUNT = "a whole number above 0"

VARIABLES = (
    Variable(("MAX_STEPS",), "sample_steps", _count, COUNT),
    Variable(("WIDTH", "HEIGHT"), "size", _size, "whole numbers above 0, both"),
    Variable(("FRAME_RATE",), "fps", _count, COUNT),
    Variable(("MAX_FRAMES",), "frame_num", _frames, COUNT, rivals=("duration",)),
    Variable(
        ("MOTION_FRAME",),
        "refert_num",
        _count,
        COUNT,
        beside=(("context_frames", "context_overlap"), ("extend", "extend_overlap")),
    ),
    Variable(("WAN_TORCH_COMPILE",), "compile", str2bool, "True or False"),
    Variable(("WAN_LORA_STREAMING",), "lora_mode", _mode("stream"), "True or False"),
    Variable(("WAN_LORA_ONTHEFLY",), "lora_mode", _mode("onthefly"), "True or False"),
    Variable(("WAN_LORA_TIMING",), "lora_timing", str2bool, "True or False"),
)


def fill(args: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """Put what the variables say where `args` says nothing, and return a line on each that was set.

    Raises BadRequest naming a variable whose value cannot be read, also one that would not be used.
    """
    taken: dict[str, str] = vars(args).setdefault("_variables", {})
    lines = []
    for variable in VARIABLES:
        given = {name: environment[name] for name in variable.names if environment.get(name)}
        if not given:
            continue
        value, said = _read(variable, given), " ".join(f"{name}={text}" for name, text in given.items())
        if value is None:
            continue
        dest = next((instead for flag, instead in variable.beside if _is_set(args, flag)), variable.dest)
        if dest in taken:
            both = " and ".join(f"{text} in the environment" for text in (taken[dest], said))
            raise BadRequest(f"{both} contradict each other: unset one")
        flag = next((each for each in (dest, *variable.rivals, *RECORDED) if _is_set(args, each)), None)
        if flag is not None:
            lines.append(f"{said} in the environment is not used: --{flag.rstrip('_')} says it")
            continue
        setattr(args, dest, value)
        taken[dest] = said
        lines.append(f"{said} in the environment is taken as --{dest} {value}")
    return lines


def taken_from(args: argparse.Namespace, dest: str) -> str:
    """The variable that set a flag, for the user; "" where none did."""
    said = vars(args).get("_variables", {}).get(dest)
    return f"{said} in the environment" if said else ""


@contextlib.contextmanager
def named(args: argparse.Namespace) -> Iterator[None]:
    """What is said about a flag that a variable set names the variable too; not where lines of a file say flags."""
    try:
        yield
    except WanError as error:
        taken: Mapping[str, str] = vars(args).get("_variables", {})
        said = [f"--{dest} is {text}" for dest, text in taken.items() if f"--{dest}" in str(error)]
        if not said or args.prompt_file is not None:
            raise
        raise type(error)(f"{error}; {', '.join(said)} in the environment") from error


def _read(variable: Variable, given: Mapping[str, str]) -> Any:
    lacking = [name for name in variable.names if name not in given]
    if lacking:
        raise BadRequest(f"{next(iter(given))} is set in the environment and {lacking[0]} is not: set both, or use "
                         f"--{variable.dest}")  # fmt: skip
    try:
        return variable.read(*given.values())
    except (ValueError, argparse.ArgumentTypeError):
        said = " ".join(f"{name}={text!r}" for name, text in given.items())
        raise BadRequest(f"{said} in the environment: give {variable.wants}, or unset it") from None


def _is_set(args: argparse.Namespace, dest: str) -> bool:
    return getattr(args, dest) is not None
