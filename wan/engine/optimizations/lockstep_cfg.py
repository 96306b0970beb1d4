"""The branches of classifier-free guidance side by side, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor, nn

from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order
from wan.engine.sampling.denoiser import Grouped, timesteps
from wan.engine.types import Condition, Denoiser, Segment, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine


class LockstepModel(Protocol):
    """What a DiT offers that can keep several forwards in step."""

    def velocities(
        self,
        latents: Tensor,
        timesteps: Mapping[str, Tensor],
        conditions: Mapping[str, Condition],
        stacked: Condition,
        step: Step,
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class LockstepCFG(Optimization):
    """Let the guidance branches of a step take turns at every block, so that a swapped block is copied once for all.

    Each branch computes what it would alone, bit for bit; while one is in a block, the other's tokens wait: a residual
    stream more (1.5 GB for 14B at 1280x720x81, computed). For `block_swap` where copies do not hide behind computing;
    without swapped blocks it gains nothing. Branches of different shapes are computed one after the other.
    """

    order = Order.BRANCHES
    grade = "bitwise"
    cost = "a residual stream more"
    per_call = True
    conflicts = (Conflict("BatchedCFG", "a batch goes through a block at once, which is copied once too"),)
    lockstep_cfg: bool = option(False, "compute the guidance branches block by block in turn")

    def apply(self, engine: Engine) -> None:
        engine.wrap_denoiser(in_lockstep)


def in_lockstep(inner: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
    """A denoiser that keeps branches of equal shapes in step and leaves single ones to `inner`."""
    model = cast("LockstepModel", dit)

    def together(
        latents: Tensor, step: Step, branches: Mapping[str, Condition], stacked: Condition
    ) -> dict[str, Tensor]:
        batch = len(stacked.context) // len(branches)
        latents = latents.expand(batch, *latents.shape[1:])
        times = {name: timesteps(step, each, batch, latents) for name, each in branches.items()}
        return model.velocities(latents, times, branches, stacked, step)

    return Grouped(inner, together)
