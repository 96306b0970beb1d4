"""The folders a user may choose for what can be made again, and `--clear_compile_cache`.

Compiled code lies in one folder for each version of torch, which carries the tag that backup programs know. Only
folders with our own tag are ever deleted: the one around them, and PyTorch's own cache, may hold other programs' work.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from wan.cli import env
from wan.engine.errors import BadRequest, OutputError

if TYPE_CHECKING:
    from wan.engine.plan import Plan

OFF = "off"
COMPILED = "compiled"
TAG_NAME = "CACHEDIR.TAG"
TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Compiled code that wan-engine keeps between runs; generate.py --clear_compile_cache deletes this folder.\n"
)
"""The signature is of bford.info/cachedir; the text behind it says whose the folder is."""


def folder(args: argparse.Namespace, flag: str, default: str, *, make: bool) -> Path | None:
    """Where `--flag` says, or `default` in the user's cache folder; None for "off" and for a user without a home.

    Raises BadRequest where the user names a folder that cannot be used; the default one may fail unnoticed.
    """
    named: str | None = getattr(args, flag)
    if named is None:
        base = env.cache_folder()
        return None if base is None else base / default
    if named.lower() == OFF:
        return None
    chosen = Path(named).expanduser()
    try:
        if make and named:
            chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"--{flag} {named!r}: no folder can be made there ({error.strerror}); choose another, or off"
        ) from error
    if not named or (make and not os.access(chosen, os.W_OK | os.X_OK)):
        raise BadRequest(f"--{flag} {named!r} is no folder that can be written: choose another, or off")
    return chosen


def keep_compiled(args: argparse.Namespace, plan: Plan) -> None:
    """Let torch keep compiled code in a folder of its version; a place the user gave in the environment stays.

    Raises BadRequest where `--compile_cache_dir` cannot be used.
    """
    from wan.engine.compiling import Compiled

    if not any(isinstance(chosen, Compiled) for chosen in plan.enabled()):
        return
    base = folder(args, "compile_cache_dir", COMPILED, make=not args.print_plan)
    if base is None or args.print_plan:
        return
    version = base / f"torch-{metadata.version('torch')}"
    try:
        version.mkdir(parents=True, exist_ok=True)
        tag = version / TAG_NAME
        if not tag.exists() and not any(version.iterdir()):
            tag.write_text(TAG, encoding="utf-8")
    except OSError:
        return  # the default folder of a user who cannot write at home: torch has one in the temporary folder
    env.keep_compiled_in(version)


def clear_compiled(args: argparse.Namespace) -> Iterator[str]:
    """Delete compiled code, with `--dry_run` only look for it; yields what to tell.

    Raises BadRequest, or OutputError where the system refuses.
    """
    if not args.clear_compile_cache:
        raise BadRequest("--dry_run says what --clear_compile_cache would delete: give both; a run has --print_plan")
    base = folder(args, "compile_cache_dir", COMPILED, make=False)
    found = sorted(filter(_ours, base.iterdir())) if base is not None and base.is_dir() else []
    for each in found:
        files, size = _measure(each)
        if not args.dry_run:
            try:
                shutil.rmtree(each)  # unlinks links, never follows them
            except OSError as error:
                raise OutputError(f"{str(each)!r} cannot be deleted ({error}); delete it yourself") from error
        yield f"{'would delete' if args.dry_run else 'deleted'} {each}: {files} files, {size / 2**20:.1f} MiB"
    if not found:
        yield f"nothing of ours to delete in {base or 'any cache folder'}"


def _ours(path: Path) -> bool:
    """Whether `keep_compiled` made this folder."""
    tag = path / TAG_NAME
    if path.is_symlink() or not path.is_dir() or tag.is_symlink() or not tag.is_file():
        return False
    try:
        return path.name.startswith("torch-") and tag.read_bytes() == TAG.encode()
    except OSError:
        return False


def _measure(path: Path) -> tuple[int, int]:
    """Files and bytes in a folder; links count as themselves."""
    sizes = [os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(path) for name in names]
    return len(sizes), sum(sizes)
