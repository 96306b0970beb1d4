"""Several projections of one input: the place where they can be fused without the model knowing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def project(x: Tensor, *layers: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What every layer makes of `x`, in order."""
    return tuple(layer(x) for layer in layers)
