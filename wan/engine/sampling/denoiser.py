"""The innermost denoiser: asks the model for each branch of a step, or for several at once. Windows wrap it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from wan.engine.types import Condition, Denoiser, Step


class VelocityModel(Protocol):
    """What the engine asks of a DiT."""

    def velocity(
        self, latents: Tensor, timestep: Tensor, condition: Condition, step: Step | None, branches: tuple[str, ...]
    ) -> Tensor: ...


class Sequential:
    """One forward per branch, in the order of the branches."""

    def __init__(self, dit: VelocityModel) -> None:
        self.dit = dit

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        return {name: velocity(self.dit, latents, step, branch, (name,)) for name, branch in branches.items()}


Together = Callable[[Tensor, Step, Mapping[str, Condition], Condition], dict[str, Tensor]]
"""(latents, step, branches whose tensors have equal shapes, the same as one batch) -> the velocity of each."""
_Stacked = dict[tuple[int, ...], tuple[list[Condition], Condition]]


class Grouped:
    """Branches of equal shapes `together`; single ones are left to `inner`."""

    def __init__(self, inner: Denoiser, together: Together) -> None:
        self.inner = inner
        self.together = together
        self.stacked: _Stacked = {}
        self.before: _Stacked = {}
        self.index = -1

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        if step.index != self.index:
            self.index, self.before, self.stacked = step.index, self.stacked, {}
        groups: dict[object, dict[str, Condition]] = {}
        for name, condition in branches.items():
            groups.setdefault((type(condition), condition.shapes()), {})[name] = condition
        found: dict[str, Tensor] = {}
        for group in groups.values():
            if len(group) == 1:
                found |= self.inner(latents, step, group)
            else:
                found |= self.together(latents, step, group, self._stack(list(group.values())))
        return {name: found[name] for name in branches}

    def _stack(self, conditions: list[Condition]) -> Condition:
        """The conditions as one, the same object as in the step before, so that what it memorises is kept."""
        key = tuple(map(id, conditions))
        if key not in self.stacked:
            made = self.before.get(key) or (conditions, type(conditions[0]).cat(conditions))
            self.stacked[key] = made  # the list in it keeps the ids alive
        return self.stacked[key][1]


def velocity(
    dit: VelocityModel, latents: Tensor, step: Step, condition: Condition, branches: tuple[str, ...]
) -> Tensor:
    """One forward: latents [1, C, T, H, W] repeated to the condition's batch B; velocity [B, C, T, H, W]."""
    batch = condition.context.shape[0]
    latents = latents.expand(batch, *latents.shape[1:])
    return dit.velocity(latents, timesteps(step, condition, batch, latents), condition, step, branches)


def timesteps(step: Step, condition: Condition, batch: int, latents: Tensor) -> Tensor:
    """Float32 timesteps [1] for all, or [B, T] where frames differ: `frame_t` or else `t`, and 0 where frozen."""
    if step.frame_t is not None:
        values = condition.once(
            f"frame_t:{step.index}:{step.window}", lambda: torch.tensor([step.frame_t], device=latents.device)
        )
        values = values.expand(batch, -1)
    else:
        # Filled on the device: a copy from the host would wait for the queue.
        values = torch.full((1,), step.t, dtype=torch.float32, device=latents.device)
    if condition.frozen is None:
        return values
    # A frame rests at timestep 0 only where all of it is known.
    moving = 1 - condition.frozen.amin(dim=(1, 3, 4))
    return (values[:, None] if values.ndim == 1 else values) * moving
