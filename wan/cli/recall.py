"""`--resume`, `--decode` and `--from`: a command line filled from what an earlier one left behind."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan.cli import record
from wan.cli.generate import Care
from wan.cli.naming import run_folder
from wan.engine.errors import BadRequest
from wan.runs import holds_work, read_latents, read_record

SOURCES = ("resume", "decode", "from_")


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """What the command line says about care, and the record it continues or repeats, if any."""

    care: Care
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, Any] | None = None
    source: str = ""

    def differences(self, now: Mapping[str, Any]) -> tuple[str, ...]:
        """What is unlike the recorded run, for the user to know before this one starts.

        Raises BadRequest where a run would go on with other weights than it began with.
        """
        if self.repeated is None:
            return ()
        if self.care.resume is not None:
            record.require_same_start(self.repeated, now, source=self.source)
        if self.care.latents is not None:  # only the VAE has work left to do
            changed = "vae" in record.changed_weights(self.repeated, now)
            return ("the latents were made for other weights of the VAE",) if changed else ()
        return tuple(record.differences(self.repeated, now))


def recall(args: argparse.Namespace) -> Recalled:
    """Fill `args` from the run, latents or video they name. Raises BadRequest; reads no weight."""
    given = [name for name in SOURCES if getattr(args, name) is not None]
    if len(given) > 1:
        said = " and ".join(f"--{name.rstrip('_')}" for name in given)
        raise BadRequest(f"{said} each name what to continue from: give one of them")
    care = _care(args)
    if not given:
        return Recalled(care=care)
    if args.quality is not None:
        flag = f"--{given[0].rstrip('_')}"
        raise BadRequest(f"--quality {args.quality}: {flag} has its options already; leave one of the two out")
    path = Path(getattr(args, given[0])).expanduser()
    if given[0] == "resume":
        return _resumed(args, care, path)
    if given[0] == "decode":
        return _decoded(args, care, path)
    made = record.read(path)
    changed = record.apply(args, made, source=f"--from {str(path)!r}", strict=False)
    notes = (f"unlike {path.name}: {', '.join(changed)}",) if changed else ()
    return Recalled(care=care, notes=notes, repeated=made)


def _resumed(args: argparse.Namespace, care: Care, path: Path) -> Recalled:
    """The run in a folder, which may also be named by the video it was going to make."""
    folder = path if path.is_dir() or path.suffix == ".run" else run_folder(path)
    source = f"--resume {str(path)!r}"
    video = folder.with_name(folder.stem)
    if not folder.is_dir() and video.is_file():
        raise BadRequest(f"{source}: {str(video)!r} is finished, nothing is left to continue")
    made = _complete(read_record(folder), source)
    record.apply(args, made, source=source, strict=True)
    if args.save_file is None:
        args.save_file = _destination(made)
    return Recalled(care=replace(care, resume=folder), repeated=made, source=source)


def _decoded(args: argparse.Namespace, care: Care, path: Path) -> Recalled:
    """Finished latents; they go under the name first meant for them, unless another video has it by now."""
    made = _complete(read_latents(path)[1], f"--decode {str(path)!r}")
    record.apply(args, made, source=f"--decode {str(path)!r}", strict=True)
    name = _destination(made)
    own = name is not None and path.absolute().parent == run_folder(Path(name)).absolute()
    if args.save_file is None and name is not None and (own or not Path(name).exists()):
        args.save_file = name
    return Recalled(care=replace(care, latents=path), repeated=made)


def _complete(made: dict[str, Any], source: str) -> dict[str, Any]:
    """`made`, if it says what to make."""
    if not isinstance(made.get("flags"), dict) or "task" not in made["flags"]:
        raise BadRequest(f"{source} does not say what it was made by: pass what a run of generate.py kept")
    return made


def refuse_to_replace(path: Path, care: Care) -> None:
    """Raise BadRequest where the video's own folder keeps the work of a run that this one does not continue."""
    folder = run_folder(path)
    decodes_it = care.latents is not None and care.latents.absolute().parent == folder.absolute()
    if care.resume is None and not decodes_it and holds_work(folder):
        raise BadRequest(
            f"--save_file {str(path)!r}: an unfinished run of it is kept in {str(folder)!r}; continue it with "
            f"--resume {str(folder)!r}, or remove the folder, or choose another name"
        )


def _destination(made: Mapping[str, Any]) -> str | None:
    output = made.get("output", {})
    return str(output["path"]) if "path" in output else None


def _care(args: argparse.Namespace) -> Care:
    every = Care.state_every if args.state_every is None else args.state_every
    if every < 0:
        raise BadRequest(f"--state_every {every}: give a number of steps, 0 to keep no state")
    if args.timeout_s is not None and not (math.isfinite(args.timeout_s) and args.timeout_s > 0):
        raise BadRequest(f"--timeout_s {args.timeout_s!r}: give a number of seconds greater than 0")
    return Care(
        state_every=every, keep_latents=bool(args.keep_latents), timeout_s=args.timeout_s,
        metadata=not args.no_metadata, sidecar=not args.no_sidecar,
    )  # fmt: skip
