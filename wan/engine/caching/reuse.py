"""The two places where a step can be answered without running the blocks: at the trunk, and at the denoiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wan.engine.accounting import Trunk
from wan.engine.types import Condition, Denoiser, Step

Key = tuple[tuple[str, ...], tuple[int, ...]]
"""(branches, window): what a kept residual belongs to."""


@dataclass
class ReusedResidual:
    """A trunk whose residual, tokens after minus tokens before the blocks, also serves the `skipped` steps after it.

    Embedding and head run in every step. Kept in `dtype`, one residual a branch and window. Source: TeaCache, MagCache.
    """

    trunk: Trunk
    skipped: Collection[int]
    dtype: torch.dtype
    kept: dict[Key, tuple[int, Tensor]] = field(default_factory=dict)
    computed: int = -1
    """Index of the last step that ran the blocks for any branch."""

    def __call__(self, tokens: Tensor, inputs: Any, condition: Condition, step: Step) -> Tensor:
        key = inputs.branches, step.window
        index, residual = self.kept.get(key, (-1, tokens))
        # A branch that was not asked for in the last computed step has only an older residual: it is computed.
        if step.index in self.skipped and index == self.computed >= 0:
            return tokens + residual.to(tokens.dtype)
        after = self.trunk(tokens, inputs, condition, step)
        self.kept.pop(key, None)  # before the new one is made, so that there is never one too many
        if step.index + 1 in self.skipped:
            self.kept[key] = step.index, (after - tokens).to(self.dtype)
        self.computed = step.index
        return after


@dataclass
class ReusedVelocity:
    """A denoiser that predicts from the drift of the latents how far the velocity has moved, and else keeps it.

    What is kept is the velocity minus the latents, per branch. `may_skip` holds the indices of steps that may be
    answered so. The "cond" branch (or the first) decides for all, which reads one number from the device in each such
    step. Source: EasyCache4Wan2.1.
    """

    denoiser: Denoiser
    may_skip: Collection[int]
    threshold: float
    _rate: Tensor | None = None
    _moved: float = 0.0
    _before: Tensor | None = None
    _at: Tensor | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _scale: Tensor | None = None
    _velocity: Tensor | None = None

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        skip = self._skips(latents, step, branches)
        self._before = latents
        if skip:
            return {name: latents + self._kept[name] for name in branches}
        velocities = self.denoiser(latents, step, branches)
        self._remember(latents, velocities)
        return velocities

    def _skips(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> bool:
        known = self._rate is not None and branches.keys() <= self._kept.keys()
        if not known or step.index not in self.may_skip:
            return False
        assert self._rate is not None and self._before is not None and self._scale is not None
        drift = (latents - self._before).abs().mean()
        self._moved += float(self._rate * drift / self._scale)
        return self._moved < self.threshold

    def _remember(self, latents: Tensor, velocities: Mapping[str, Tensor]) -> None:
        decides = velocities["cond"] if "cond" in velocities else next(iter(velocities.values()))
        self._moved = 0.0
        if self._velocity is not None and self._at is not None:
            self._rate = (decides - self._velocity).abs().mean() / (latents - self._at).abs().mean()
        self._velocity, self._at, self._scale = decides, latents, decides.abs().mean()
        self._kept = {name: velocity - latents for name, velocity in velocities.items()}
