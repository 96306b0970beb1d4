"""From a record back to a command line: what was not spelled is filled in, what is different now is told.

A record may come from a stranger's video. It fills only flags that say what to make, from which weights and how to
run; never where to write. Every value must be one its flag would take.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from wan.cli.args import FLAGS, INPUT, Flag, guidance
from wan.cli.presets import chosen_here
from wan.conditioning.geometry import frames_for, parse_size
from wan.engine.errors import BadRequest
from wan.engine.given_loras import LORA_FLAGS
from wan.engine.hardware import world
from wan.engine.optimizations import LoRA, registry
from wan.engine.options import Option, check_value, options_of, spelled
from wan.engine.plan import Optimization

PIXELS = (
    "task", "prompt", "n_prompt", "size", "frame_num", "base_seed", "noise_device", "sample_solver", "sample_steps",
    "sample_shift", "sample_guide_scale", *(flag.name for flag in FLAGS if flag.group == INPUT),
)  # fmt: skip
"""Flags that make another video."""

FILES = ("ckpt_dir", "dit", "dit_low", "t5", "vae", "clip", "tokenizer")
"""Flags that name weights. They may lie elsewhere by now; hashes tell whether they are the same."""

_PATHS = (*FILES, *(flag.name for flag in FLAGS if flag.is_file))


OTHERS = ("any_size", "load_format", "fps", "crf")

# How the VAE works may change, also in a resumed run: finished latents are safe, and memory or float16's range may be
# what ran out.
_VAE = (
    "vae_dtype", "vae_channels_last", "vae_subpixel", "vae_matmul_attention", "vae_compile",
    "vae_frames_per_call", "vae_tiling", "vae_tile_size", "vae_tile_overlap", "vae_tile_park",
)  # fmt: skip

# Changes the file, not the frames in it.
_WITHOUT_EFFECT = ("python", "imageio-ffmpeg")


def apply(args: argparse.Namespace, record: Mapping[str, Any], *, source: str, strict: bool) -> list[str]:
    """Fill what was not spelled in `args` from `record`; returns what was spelled differently, in words.

    `source` is how the user named the record ("--from clip.mp4"). With `strict`, for a run that goes on, a spelled
    flag that changes the frames and contradicts is refused. Raises BadRequest.
    """
    flags, known = record.get("flags", {}), _replayed()
    unknown = sorted(set(flags) - set(known))
    if unknown and strict:
        raise BadRequest(
            f"{source} was made by version {record.get('version')} with --{unknown[0]}, which this version does not "
            "have: continue with that version"
        )
    different = [f"--{name} is unknown to this version" for name in unknown]
    taken = {name: _restored(known[name], flags[name], source) for name in known if name in flags}
    values = _unset(record, known) | taken
    skipped = {*_unwanted_files(args, values), *_frames(args, values, source, strict)}
    if args.preset is not None and not _preset(args, record, source, strict):
        skipped |= set(_options())
        different.append(f"--preset {args.preset} instead of the options it was made with")
    args.preset = args.preset or "none"
    if args.base_seed is not None and args.base_seed < 0 and strict:
        args.base_seed = None
    for name, value in values.items():
        spelled = getattr(args, name)
        if spelled is None:
            if value is not None and name not in skipped and _needed(args, name, value):
                setattr(args, name, _present(name, value, source))
        elif not _same(name, spelled, value):
            if strict and (name in PIXELS or (_changes_bits(name) and name not in _VAE)):
                raise _contradiction(_said(args, name), name, value, source)
            different.append(f"{_said(args, name)} instead of {_text(value)}")
    return different


def differences(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is unlike the recorded run, a line each; the last line says whether its bits can be expected."""
    versions = _changed(*({"wan": each.get("version"), **each.get("versions", {})} for each in (record, now)))
    devices = _changed_in("device", record, now, ("name", "instructions", "processes"))
    plan = _changed_in("plan", record, now)
    noise = _changed_in("flags", record, now, ("noise_device",))
    rescue, weights, inputs = _rescue(record), changed_weights(record, now), _changed_files("inputs", record, now)
    lines = [f"{name} {then or 'none'} then, {value or 'none'} now" for name, (then, value) in versions.items()]
    lines += [f"on {then} then, on {value} now" for then, value in devices.values()]
    lines += [f"--{name} {_text(then)} then, {_text(value)} now" for name, (then, value) in plan.items()]
    lines += [f"decoded {rescue} then, as memory ran out"] if rescue else []
    lines += [f"noise drawn on {then} then, on {value} now" for then, value in noise.values()]
    lines += [f"other weights of {part}: {now['weights'][part]['file']!r} now" for part in weights]
    lines += [f"--{name} is another file now: {now['inputs'][name]['file']!r}" for name in inputs]
    pixels = _changed_in("flags", record, now, PIXELS)
    if weights or inputs or any(not _same(name, *pair) for name, pair in pixels.items()):
        return [*lines, "this makes another video"]
    if devices or rescue or set(versions) - set(_WITHOUT_EFFECT) or any(map(_changes_bits, plan)):
        return [*lines, "the same scene can be expected, not the same bits"]
    card = " as far as this card repeats itself" if now.get("device", {}).get("type") == "cuda" else ""
    return [*lines, f"the same bits can be expected{card}"]


def changed_weights(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts whose weights are known to be others."""
    return _changed_files("weights", record, now)


def require_same_start(record: Mapping[str, Any], now: Mapping[str, Any], *, source: str) -> None:
    """Raise BadRequest where a run cannot go on here, or would with other weights than it began with."""
    for then, value in _changed_in("flags", record, now, ("noise_device",)).values():
        raise BadRequest(
            f"{source} draws its noise on {then}, here it would be {value}: continue where there is {then}"
        )
    for part in changed_weights(record, now):
        raise BadRequest(
            f"{source} was begun with other weights of {part} than {now['weights'][part]['file']!r} holds now: "
            f"pass those it began with ({record['weights'][part].get('file')!r}), or start a new video"
        )
    for name in _changed_files("inputs", record, now):
        raise BadRequest(
            f"{source} was begun with another --{name}: {now['inputs'][name]['file']!r} has changed since; bring back "
            "the file it began with, or start a new video"
        )


# Filling ------------------------------------------------------------------------------------------------------------


@cache
def _options() -> dict[str, tuple[Option, type[Optimization]]]:
    """Name -> option and the optimisation that declares it."""
    return {o.name: (o, kind) for kind in registry() for o in options_of(kind)}


def _replayed() -> dict[str, Flag | Option]:
    """Every flag a record may fill."""
    named = {*PIXELS, *FILES, *OTHERS}
    options = {name: option for name, (option, _) in _options().items()}
    return {flag.dest: flag for flag in FLAGS if flag.name in named} | options


def _unset(record: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were left to the task and the machine: what is spelled now is not what they had."""
    return {name: None for name, value in record.get("plan", {}).items() if value is None and name in known}


def _restored(declared: Flag | Option, value: Any, source: str) -> Any:
    """A value from JSON as the command line would have given it. Raises BadRequest for one that its flag refuses."""
    if isinstance(declared, Option):
        return check_value(declared, value, f"{source}: its record")
    if declared.kind is guidance and isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        return float(value[0]), float(value[1])
    if declared.kind in (float, guidance):
        fits = _is_number(value)
        value = float(value) if fits else value
    elif declared.kind is int:
        fits = _is_number(value) and isinstance(value, int)
    else:
        fits = isinstance(value, bool if declared.kind is None else str)
    if not fits or (declared.choices and value not in declared.choices):
        raise BadRequest(f"{source}: its record has {declared.name} = {value!r}, which --{declared.name} does not take")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unwanted_files(args: argparse.Namespace, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The recorded weights that would get in the way of those spelled."""
    if args.ckpt_dir is not None:
        return (*FILES, "load_format")
    if args.load_format == "dummy":
        return FILES
    return ("load_format",) if any(getattr(args, name) is not None for name in FILES) else ()


def _frames(args: argparse.Namespace, values: Mapping[str, Any], source: str, strict: bool) -> tuple[str, ...]:
    """--duration is another spelling of --frame_num."""
    if args.duration is None or "frame_num" not in values:
        return ()
    fps = args.fps or values.get("fps", 0)
    if strict and math.isfinite(args.duration) and frames_for(args.duration, fps) != values["frame_num"]:
        raise _contradiction(_said(args, "duration"), "frame_num", values["frame_num"], source)
    return ("frame_num",)


def _preset(args: argparse.Namespace, record: Mapping[str, Any], source: str, strict: bool) -> bool:
    """True when the recorded options stand although --preset is spelled, because they are that preset's."""
    same: bool = args.preset in (record.get("preset"), "none")
    if strict and not same:
        raise BadRequest(
            f"--preset {args.preset!r} contradicts {source}, which has its options already: leave the flag out"
        )
    if same:
        args.preset = "none"
    return same


def _needed(args: argparse.Namespace, name: str, value: Any) -> bool:
    """False for what would come out the same unspelled, so that the log names only what the record changed."""
    if name == "noise_device":
        # Where there is no card its noise cannot be had: `differences` says so.
        here = _device_type(args)
        return bool(value != here and (value != "cuda" or _has_cuda()))
    if name == "any_size":
        return bool(value)
    if name not in _options():
        return True
    return bool(value != chosen_here([name], world()[1]).get(name, (_options()[name][0].default, ""))[0])


def _present(name: str, value: Any, source: str) -> Any:
    """`value`, or BadRequest where it is a path of another machine."""
    if name in _PATHS and os.path.isabs(value) and not Path(value).exists():
        raise BadRequest(f"{source} was made with --{name} {value!r}, which is not here: pass --{name} with yours")
    return value


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _device_type(args: argparse.Namespace) -> str:
    if args.device is not None:
        return str(args.device).partition(":")[0]
    return "cuda" if _has_cuda() else "cpu"


# Comparing ----------------------------------------------------------------------------------------------------------


def _same(name: str, a: Any, b: Any) -> bool:
    """Whether two values of a flag mean the same."""
    if name == "size":
        return parse_size(a) == parse_size(b)
    if name == "sample_guide_scale":
        return _pair(a) == _pair(b)
    if name in LORA_FLAGS:
        first, second = (LoRA(lora=tuple(each)).absolute()["lora"] for each in (a, b))
        return first == second
    if name in _PATHS:
        return os.path.abspath(Path(a).expanduser()) == os.path.abspath(Path(b).expanduser())
    return bool(a == b)


def _changed_files(table: str, record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The files of a table whose hashes are known and differ."""
    then, here = ({name: _hash(held) for name, held in each.get(table, {}).items()} for each in (record, now))
    return [name for name, taken in then.items() if taken and here.get(name) not in (None, taken)]


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (then, now) of what differs; None where one has no such name."""
    pairs = {name: (then.get(name), now.get(name)) for name in dict.fromkeys([*then, *now])}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _changed_in(
    table: str, record: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """The same for a table of both; what only one of them knows (an option of a later version) tells nothing."""
    then, here = record.get(table, {}), now.get(table, {})
    both = [name for name in (then if names is None else names) if name in then and name in here]
    return _changed({name: then[name] for name in both}, {name: here[name] for name in both})


def _rescue(record: Mapping[str, Any]) -> str:
    """How the latents were decoded, if not as the plan had it."""
    decode = str(record.get("result", {}).get("decode") or "whole")
    return "" if decode == "whole" or record.get("plan", {}).get("vae_tiling") else decode


def _hash(held: Any) -> str | None:
    return held.get("hash") if isinstance(held, dict) else None


def _pair(scale: Any) -> tuple[Any, ...]:
    return tuple(scale) if isinstance(scale, tuple | list) else (scale, scale)


def _changes_bits(name: str) -> bool:
    """Whether another value of an option may give other bits."""
    return name in _options() and _options()[name][1].grade != "bitwise"


def _contradiction(said: str, name: str, value: Any, source: str) -> BadRequest:
    return BadRequest(
        f"{said} contradicts {source}, which has --{name} {_text(value)}: leave the flag out, or start a new video"
    )


def _said(args: argparse.Namespace, name: str) -> str:
    """How the user spelled it; a caller that fills the namespace itself has spelled nothing."""
    given = spelled(args)
    return given[name][0] if name in given else f"--{name} {_text(getattr(args, name))}"


def _text(value: Any) -> str:
    """A value as the user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "on", False: "off"}[value]
    if isinstance(value, tuple | list):
        return ",".join(each if isinstance(each, str) else f"{each:g}" for each in value) or "none"
    return repr(value) if isinstance(value, str) and (" " in value or not value) else str(value)
