"""The branches of classifier-free guidance in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.sampling.denoiser import VelocityModel, velocity
from wan.engine.types import Condition, Denoiser, Segment, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class BatchedCFG(Optimization):
    """Compute the conditional and unconditional forward of a step as one batch.

    Helps where one sequence does not fill the card (small sizes, one frame); at 720p it only doubles the memory of
    activations. Branches whose tensors have different shapes are computed one after the other.
    """

    order = Order.BRANCHES
    grade = "rounding"
    tolerance = 1e-2
    per_call = True
    use_batched_cfg: bool = option(
        False,
        "compute the guidance branches as one batch",
        flags=("--use_batched_cfg", "--batched_cfg"),
        off=("--no-batched_cfg", "--no-use_batched_cfg"),
    )

    def apply(self, engine: Engine) -> None:
        engine.wrap_denoiser(batched)


_Stacked = dict[tuple[int, ...], tuple[list[Condition], Condition]]


def batched(inner: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
    """A denoiser that stacks branches of equal shapes and leaves single ones to `inner`."""
    return _Batched(inner, dit)  # type: ignore[arg-type]


class _Batched:
    def __init__(self, inner: Denoiser, dit: VelocityModel) -> None:
        self.inner = inner
        self.dit = dit
        self.stacked: _Stacked = {}
        self.before: _Stacked = {}
        self.index = -1

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        if step.index != self.index:
            self.index, self.before, self.stacked = step.index, self.stacked, {}
        groups: dict[object, list[str]] = {}
        for name, condition in branches.items():
            groups.setdefault((type(condition), condition.shapes()), []).append(name)
        found: dict[str, Tensor] = {}
        for names in groups.values():
            if len(names) == 1:
                found |= self.inner(latents, step, {names[0]: branches[names[0]]})
            else:
                parts = velocity(self.dit, latents, step, self._stack([branches[n] for n in names]), tuple(names))
                found |= zip(names, parts.chunk(len(names)), strict=True)
        return {name: found[name] for name in branches}

    def _stack(self, conditions: list[Condition]) -> Condition:
        """The conditions as one, the same object as in the step before, so that what it memorises is kept."""
        key = tuple(map(id, conditions))
        if key not in self.stacked:
            made = self.before.get(key) or (conditions, type(conditions[0]).cat(conditions))
            self.stacked[key] = made  # the list in it keeps the ids alive
        return self.stacked[key][1]
