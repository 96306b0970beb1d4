"""From latents to frames, and plan B when memory runs out: in tiles, then in smaller tiles, then on the CPU.

Hours of sampling stand before this stage, so it tries everything before it gives up.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from wan.engine.accounting import Report
from wan.engine.errors import NonFinite
from wan.engine.types import Progress, Shot, Sink, Tiling

# Latent pixels decoded at a time: small videos go in one piece, which is several times faster on a CPU; at 480p it
# is one latent frame, as upstream. The VAE's result does not depend on it.
DECODE_PIXELS = 8192
SMALL_TILE = Tiling(tile=16, overlap=4)


class Decoder(Protocol):
    """What the engine asks of a VAE."""

    def decode_chunks(
        self, latents: Tensor, *, frames_per_chunk: int, tiling: Tiling | None = None
    ) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Attempt:
    """One way to decode. `device` None means where the VAE is placed; `frames` 0 latent frames at a time, as many as
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


@dataclass(frozen=True, kw_only=True)
class Decode:
    """The decoding of one shot: `use(device)` is a context that yields the VAE where it computes.

    `earlier` are the last frames of the shots before, which the sink has already.
    """

    use: Callable[[str | None], AbstractContextManager[nn.Module]]
    shot: Shot
    latents: Tensor
    sink: Sink
    progress: Progress
    report: Report
    earlier: Tensor | None = None
    frames_per_call: int = 0

    def run(self, tiling: Tiling | None) -> Tensor | None:
        """Write all frames to the sink and return those the next shot needs. Out of memory only if all fails."""
        ways, written = attempts(tiling, max(self.latents.shape[3:]), self.frames_per_call), [0]
        for attempt, after in zip(ways, [*ways[1:], None], strict=True):
            self.report.decode = str(attempt)
            try:
                return self._attempt(attempt, written)
            except RuntimeError as error:
                if after is None or not is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback would keep the failed attempt's tensors alive.
            if self.shot.index == 0:
                self.sink.restart()
                written[0] = 0
            free_memory()
            self.progress.note(f"out of memory while decoding {attempt}; trying again {after}")
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, attempt: Attempt, written: list[int]) -> Tensor | None:
        """`written` counts the frames of this shot that the sink has: they are not written again."""
        latents = self.latents[:, :, self.shot.keep]
        if self.shot.prefix is not None:
            latents = torch.cat([self.shot.prefix, latents], dim=2)
        per_chunk = attempt.frames or max(1, DECODE_PIXELS // (latents.shape[3] * latents.shape[4]))
        tail, held = [] if self.earlier is None else [self.earlier], written[0]
        with self.use(attempt.device) as vae:
            self.progress.stage("decode", "" if attempt == Attempt() else str(attempt))
            latents = latents.to(attempt.device or latents.device)
            options = {} if attempt.tiling is None else {"tiling": attempt.tiling}
            start = 0
            for chunk in cast("Decoder", vae).decode_chunks(latents, frames_per_chunk=per_chunk, **options):
                frames = _finite(chunk[0].float(), start).clamp_(-1, 1)
                frames, start = trimmed(frames, start, self.shot.trim), start + frames.shape[1]
                if self.shot.carry_frames:
                    tail = [torch.cat([*(each.to(frames) for each in tail), frames], 1)[:, -self.shot.carry_frames :]]
                # The sink may hold earlier shots, and cannot give back a part of what it has.
                new, held = frames[:, held:], max(held - frames.shape[1], 0)
                if new.shape[1]:
                    self.sink.write(new)
                    written[0] += new.shape[1]
        return tail[0] if tail and self.shot.carry_frames else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for a device's and for the CPU allocator's refusal."""
    refused = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return refused or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _finite(frames: Tensor, start: int) -> Tensor:
    """`frames`, from number `start` of the shot on. Raises NonFinite for what would look like a picture if clamped."""
    if not bool(torch.isfinite(frames).all()):
        raise NonFinite(
            f"the VAE's frames from {start + 1} on hold NaN or infinity, its latents do not: likely a damaged VAE file"
        )
    return frames


def free_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trimmed(frames: Tensor, start: int, trim: slice) -> Tensor:
    """The part of `frames`, which begin at frame `start` of the shot, that `trim` (non-negative) keeps."""
    first = max((trim.start or 0) - start, 0)
    last = frames.shape[1] if trim.stop is None else max(trim.stop - start, 0)
    return frames[:, first:last]
