"""Plan B when memory runs out in the VAE: in tiles, then in smaller tiles, then on the CPU.

Encoding and decoding try the same ways. Hours of sampling may stand before decoding, so everything is tried.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from wan.engine.types import Progress, Tiling

SMALL_TILE = Tiling(tile=16, overlap=4)

Made = TypeVar("Made")


@dataclass(frozen=True)
class Attempt:
    """One way to code. `device` None means where the VAE is placed; `frames` 0 latent frames at a time, as many as
    their size suggests."""

    tiling: Tiling | None = None
    device: str | None = None
    frames: int = 0

    def __str__(self) -> str:
        how = f"in tiles of {self.tiling.tile} latent pixels" if self.tiling else "whole"
        how += f", {self.frames} latent frames at a time" if self.frames else ""
        return f"{how} on the CPU" if self.device == "cpu" else how


def attempts(tiling: Tiling | None, side: int, frames: int = 0) -> list[Attempt]:
    """What to try one after the other, from how the plan wants it to what needs least of the device.

    `side` is the longer side of the latents: tiles that would hold them whole save nothing. `frames` is how many latent
    ones the plan wants at a time.
    """
    wanted = tiling.tile if tiling else side
    smaller = [tiles for tiles in (Tiling(), SMALL_TILE) if tiles.tile < min(wanted, side)]
    many = [Attempt(tiling, frames=frames)] if frames else []
    last = Attempt(smaller[0] if smaller else tiling, device="cpu")
    return [*many, Attempt(tiling), *map(Attempt, smaller), last]


def first_that_fits(
    ways: Sequence[Attempt],
    act: Callable[[Attempt], Made],
    *,
    doing: str,
    progress: Progress,
    again: Callable[[], None] = lambda: None,
    lacks: Callable[[BaseException], bool] | None = None,
) -> Made:
    """What `act` gives for the first of `ways` for which memory suffices. What it raises for the last one is raised.

    Only the first is compiled, if the plan says so: for sizes and devices that nobody planned that would take minutes.
    `again` is called before another try, `lacks` tells (default `is_out_of_memory`) what another way may cure.
    """
    for way, after in zip(ways, [*ways[1:], None], strict=True):
        try:
            with nullcontext() if way is ways[0] else uncompiled():
                return act(way)
        except (RuntimeError, MemoryError) as error:
            if after is None or not (lacks or is_out_of_memory)(error):
                raise
        # Outside the handler, whose traceback would keep the failed attempt's tensors alive.
        again()
        free_memory()
        progress.note(f"out of memory while {doing} {way}; trying again {after}")
    raise AssertionError("the last attempt returns or raises")


def uncompiled() -> AbstractContextManager[object]:
    """Let compiled code run as it is written meanwhile."""
    compiler = sys.modules.get("torch._dynamo")  # where nothing was compiled it is not there, and slow to import
    return nullcontext() if compiler is None else torch.compiler.set_stance("force_eager")


def is_out_of_memory(error: BaseException) -> bool:
    """True for a device's and for the CPU allocator's refusal."""
    refused = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return refused or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def free_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
