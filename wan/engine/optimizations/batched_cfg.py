"""The branches of classifier-free guidance in one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.sampling.denoiser import Grouped, velocity
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
    cost = "twice the activations"
    per_call = True
    use_batched_cfg: bool = option(
        False,
        "compute the guidance branches as one batch",
        flags=("--use_batched_cfg", "--batched_cfg"),
        off=("--no-batched_cfg", "--no-use_batched_cfg"),
    )

    def apply(self, engine: Engine) -> None:
        engine.wrap_denoiser(batched)


def batched(inner: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
    """A denoiser that stacks branches of equal shapes and leaves single ones to `inner`."""

    def together(
        latents: Tensor, step: Step, branches: Mapping[str, Condition], stacked: Condition
    ) -> dict[str, Tensor]:
        names = tuple(branches)
        parts = velocity(dit, latents, step, stacked, names)  # type: ignore[arg-type]
        return dict(zip(names, parts.chunk(len(names)), strict=True))

    return Grouped(inner, together)
