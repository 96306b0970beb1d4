"""From latents to frames, in the first way for which memory suffices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from wan.engine.accounting import Report
from wan.engine.attempts import Attempt, attempts, first_that_fits
from wan.engine.coding import DECODE_PIXELS
from wan.engine.errors import NonFinite
from wan.engine.types import Progress, Shot, Sink, Tiling


class Decoder(Protocol):
    """What the engine asks of a VAE."""

    def decode_chunks(
        self, latents: Tensor, *, frames_per_chunk: int, tiling: Tiling | None = None
    ) -> Iterator[Tensor]: ...


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
        written = [0]

        def attempt(way: Attempt) -> Tensor | None:
            self.report.decode = str(way)
            return self._attempt(way, written)

        def again() -> None:
            if self.shot.index == 0:
                self.sink.restart()
                written[0] = 0

        ways = attempts(tiling, max(self.latents.shape[3:]), self.frames_per_call)
        return first_that_fits(ways, attempt, doing="decoding", progress=self.progress, again=again)

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


def _finite(frames: Tensor, start: int) -> Tensor:
    """`frames`, from number `start` of the shot on. Raises NonFinite for what would look like a picture if clamped."""
    if not bool(torch.isfinite(frames).all()):
        raise NonFinite(
            f"the VAE's frames from {start + 1} on hold NaN or infinity, its latents do not: likely a damaged VAE file"
        )
    return frames


def trimmed(frames: Tensor, start: int, trim: slice) -> Tensor:
    """The part of `frames`, which begin at frame `start` of the shot, that `trim` (non-negative) keeps."""
    first = max((trim.start or 0) - start, 0)
    last = frames.shape[1] if trim.stop is None else max(trim.stop - start, 0)
    return frames[:, first:last]
