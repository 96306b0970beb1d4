"""The one sampling loop. What a task, a cache, a window or a guidance adds is wrapped round its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from wan.engine.sampling.solvers import Solver
from wan.engine.types import Known, Step

Predict = Callable[[Tensor, Step], Tensor]
Observer = Callable[[Step, Tensor], None]


def sample(
    predict: Predict,
    solver: Solver,
    latents: Tensor,
    steps: Iterable[Step],
    known: Known | None = None,
    observe: Iterable[Observer] = (),
) -> Tensor:
    """Latents [B, C, T, H, W] after `steps`; every observer sees them after each step."""
    for step in steps:
        latents = solver.step(predict(latents, step), step, latents)
        if known is not None:
            latents = known.apply(latents, step)
        for callback in observe:
            callback(step, latents)
    return latents
