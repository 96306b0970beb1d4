"""Steps that reuse what an earlier one computed: TeaCache, MagCache and EasyCache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from wan.engine.accounting import Place, Range, Trunk
from wan.engine.caching.reuse import ReusedResidual, ReusedVelocity
from wan.engine.caching.schedules import magcache_skips, resampled, retained, teacache_skips
from wan.engine.caching.tables import choose, mag_table, tea_table
from wan.engine.engine import main_dtype
from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.types import Denoiser, Segment, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine

EASY_THRESHOLD = 0.05
EASY_FIRST = 10
"""Steps that EasyCache computes before it may skip one, as published."""
TEA_FIRST = {"e": 1, "e0": 5}
"""The same for TeaCache, by signal."""
Choice = Callable[[nn.Module, Segment], frozenset[int]]
"""(dit, segment) -> the positions in the segment that are skipped."""


@dataclass(frozen=True, kw_only=True)
class StepCache(Optimization):
    """Leave out the transformer's blocks in steps that hardly change anything, and reuse what the last one gave.

    `tea` (arXiv:2411.19108) and `mag` (arXiv:2506.09045) know before the first step which ones: from the movement of
    the time embedding, or from ratios measured on the model. Both need numbers of that very model; `easy`
    (EasyCache4Wan2.1) needs none and decides from the drift of the latents, which costs one wait for the device in
    such a step. The first step, the first of each expert and the last are always computed, both guidance branches
    skip the same steps, and a threshold of 0 skips nothing: the same bits as without.
    """

    order = Order.STEP_CACHE
    grade = "lossy"
    tolerance = 0.5
    cost = "a residual a branch in memory; easy waits for the device once a step"
    per_call = True
    cache: Literal["off", "tea", "mag", "easy"] = option("off", "reuse steps: TeaCache, MagCache or EasyCache")
    cache_threshold: float | None = option(
        None, "how much may change before a step is computed again; default: the careful one of the table, easy 0.05"
    )
    cache_max_skips: int | None = option(None, "steps that mag may skip in a row; default: the table's")
    cache_retain: float | None = option(
        None, "share of the first steps, of each expert, that mag always computes; default: the table's"
    )
    cache_signal: Literal["e", "e0"] = option(
        "e", "what tea measures: the time embedding, or its projection, which computes the first five steps"
    )
    cache_table: str | None = option(
        None, "measured numbers for tea and mag: the name of a published model or a file of tools/calibrate_cache.py"
    )

    def check(self, hardware: Hardware) -> None:
        if self.cache_threshold is not None and not self.cache_threshold >= 0:
            raise BadRequest(f"--cache_threshold {self.cache_threshold!r}: give 0 (skip nothing) or more")
        if self.cache_max_skips is not None and self.cache_max_skips < 1:
            raise BadRequest(f"--cache_max_skips {self.cache_max_skips!r}: give 1 or more, or --cache off")
        if self.cache_retain is not None and not 0 <= self.cache_retain <= 1:
            raise BadRequest(f"--cache_retain {self.cache_retain!r} is a share of the steps: give 0 to 1")

    def apply(self, engine: Engine) -> None:
        engine.expect_forwards(_fewer)
        if self.cache == "easy":
            # Its two first steps after a resume measure what the rest goes by.
            engine.resume_only(lambda step: step.index <= EASY_FIRST - 2)
            engine.wrap_denoiser(self._easy)
            return
        name, table = choose(self.cache_table, engine.model, self.cache)
        choice = (self._tea if self.cache == "tea" else self._mag)(name, table, engine.expert_names)
        planned = _Planned(choice)
        engine.resume_only(planned.computes)
        engine.weigh_steps(lambda step: float(planned.computes(step)))
        engine.wrap_trunk(planned.wrap)

    def _easy(self, inner: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
        threshold = EASY_THRESHOLD if self.cache_threshold is None else self.cache_threshold
        may_skip = {s.index for s in segment.steps[1:] if EASY_FIRST <= s.index < s.count - 1}
        return ReusedVelocity(inner, may_skip, threshold)

    def _mag(self, name: str, table: Mapping[str, Any], experts: tuple[str, ...]) -> Choice:
        numbers = mag_table(name, table, experts)
        threshold = numbers.threshold if self.cache_threshold is None else self.cache_threshold
        most = numbers.most if self.cache_max_skips is None else self.cache_max_skips

        def choice(dit: nn.Module, segment: Segment) -> frozenset[int]:
            share = numbers.retain[segment.expert] if self.cache_retain is None else self.cache_retain
            ratios = resampled(numbers.ratios[segment.expert], len(segment.steps))
            return magcache_skips(ratios, retained(len(segment.steps), share, last=_ends(segment)), threshold, most)

        return choice

    def _tea(self, name: str, table: Mapping[str, Any], experts: tuple[str, ...]) -> Choice:
        numbers = tea_table(name, table, experts, self.cache_signal)
        threshold = numbers.threshold if self.cache_threshold is None else self.cache_threshold

        def choice(dit: nn.Module, segment: Segment) -> frozenset[int]:
            may_skip = range(TEA_FIRST[self.cache_signal], len(segment.steps) - _ends(segment))
            distances = embedding_distances(dit, segment.steps, self.cache_signal)
            return teacache_skips(distances, may_skip, threshold, numbers.coefficients[segment.expert])

        return choice


class _Planned:
    """Wraps the trunk of each segment with the schedule of that segment, known before its first step."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.skipped: frozenset[int] = frozenset()
        """Indices of the steps that are skipped in the segment at work."""

    def wrap(self, trunk: Trunk, dit: nn.Module, segment: Segment) -> Trunk:
        positions = self.choice(dit, segment)
        self.skipped = frozenset(segment.steps[position].index for position in positions)
        return ReusedResidual(trunk, self.skipped, main_dtype(dit))

    def computes(self, step: Step) -> bool:
        """Whether the blocks run in `step`; the first one of the next segment always does."""
        return step.index not in self.skipped


def embedding_distances(dit: nn.Module, steps: Sequence[Step], signal: str) -> list[float]:
    """Relative L1 distance of the time embedding ("e") or its projection ("e0") of each step to the step before.

    The first entry is 0. One wait for the device.
    """
    device = next(dit.parameters()).device
    timesteps = torch.tensor([step.t for step in steps], device=device)
    values = dit.time_signals(timesteps)[signal == "e0"].flatten(1)  # type: ignore[operator]
    moved = (values[1:] - values[:-1]).abs().mean(1) / values[:-1].abs().mean(1)
    return [0.0, *moved.tolist()]


def _ends(segment: Segment) -> bool:
    """True for the segment that holds the last step of the run."""
    return segment.steps[-1].index == segment.steps[-1].count - 1


def _fewer(place: Place, planned: Range) -> Range:
    """At least the first step of an expert is computed."""
    return min(1, planned[0]), planned[1]
