"""The two places where a step can be answered without running the blocks: at the trunk, and at the denoiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wan.engine.accounting import Trunk
from wan.engine.types import Condition, Denoiser, Step

Key = tuple[str, tuple[int, ...]]
"""(branch, window): what a kept residual belongs to."""


@dataclass
class ReusedResidual:
    """A trunk whose residual, tokens after minus tokens before the blocks, also serves the `skipped` steps after it.

    Embedding and head run in every step. Kept in `dtype`, one residual a branch and window, whether branches go
    together or not. Source: TeaCache, MagCache.
    """

    trunk: Trunk
    skipped: Collection[int]
    dtype: torch.dtype
    kept: dict[Key, tuple[int, Tensor]] = field(default_factory=dict)
    computed: int = -1
    """Index of the last step that ran the blocks for any branch."""

    def __call__(self, tokens: Tensor, inputs: Any, condition: Condition, step: Step) -> Tensor:
        keys = [(branch, step.window) for branch in inputs.branches]
        kept = [self.kept.get(key, (-1, tokens)) for key in keys]
        # A branch that was not asked for in the last computed step has only an older residual: it is computed.
        if step.index in self.skipped and all(index == self.computed >= 0 for index, _ in kept):
            return _sum(tokens, [residual for _, residual in kept])
        if step.index != self.computed:
            self.kept.clear()  # of no use from here on, and windows that moved would pile up
        after = self.trunk(tokens, inputs, condition, step)
        if step.index + 1 in self.skipped:
            residuals = (after - tokens).to(self.dtype).chunk(len(keys))
            self.kept |= {key: (step.index, residual) for key, residual in zip(keys, residuals, strict=True)}
        self.computed = step.index
        return after


def _sum(tokens: Tensor, residuals: Sequence[Tensor]) -> Tensor:
    """Tokens and the residuals of the branches in their batch, which were kept together or apart."""
    parts = zip(tokens.chunk(len(residuals)), residuals, strict=True)
    sums = [part + residual.to(part.dtype) for part, residual in parts]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


@dataclass
class ReusedVelocity:
    """A denoiser that predicts from the drift of the latents how far the velocity has moved, and else keeps it.

    What is kept is the velocity minus the latents, per branch. `may_skip` holds the indices of steps that may be
    answered so. The "cond" branch (or the first) decides for all, which reads one number from the device in each such
    step. Each window of a long video goes by itself. Source: EasyCache4Wan2.1.
    """

    denoiser: Denoiser
    may_skip: Collection[int]
    threshold: float
    _now: dict[tuple[int, ...], _Drift] = field(default_factory=dict)
    _before: dict[tuple[int, ...], _Drift] = field(default_factory=dict)
    _index: int = -1

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        if step.index != self._index:  # what windows of earlier steps left is dropped
            self._index, self._before, self._now = step.index, self._now, {}
        drift = self._now[step.window] = self._before.get(step.window) or _Drift()
        if step.index in self.may_skip and drift.foresees(branches):
            skip = drift.grown(latents) < self.threshold
        else:
            skip = False
        drift.before = latents
        if skip:
            return {name: latents + drift.kept[name] for name in branches}
        velocities = self.denoiser(latents, step, branches)
        drift.learn(latents, velocities)
        return velocities


@dataclass
class _Drift:
    """What is known of the way of the latents, and of the velocity that was computed last."""

    rate: Tensor | None = None
    """By how much the velocity moves when the latents do."""
    moved: float = 0.0
    before: Tensor | None = None
    at: Tensor | None = None
    velocity: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def foresees(self, branches: Mapping[str, Condition]) -> bool:
        return self.rate is not None and branches.keys() <= self.kept.keys()

    def grown(self, latents: Tensor) -> float:
        """The estimated movement of the velocity since it was computed, relative to it."""
        assert self.rate is not None and self.before is not None and self.velocity is not None
        self.moved += float(self.rate * (latents - self.before).abs().mean() / self.velocity.abs().mean())
        return self.moved

    def learn(self, latents: Tensor, velocities: Mapping[str, Tensor]) -> None:
        decides = velocities["cond"] if "cond" in velocities else next(iter(velocities.values()))
        self.moved = 0.0
        if self.velocity is not None and self.at is not None:
            self.rate = (decides - self.velocity).abs().mean() / (latents - self.at).abs().mean()
        self.velocity, self.at = decides, latents
        self.kept = {name: velocity - latents for name, velocity in velocities.items()}
