"""Token by token: most of a block treats every token alone, so it can be done for a run of tokens at a time, and the
residual stream can be written where it stands. Both save memory and change no bit of what a row holds.

Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["RUN_VALUES", "Around", "accumulate", "at_once", "in_runs", "may_write", "run_length", "runs"]

RUN_VALUES = 2**23
"""Values of a float32 temporary in a long sequence: 32 MiB, enough to keep a card busy and launches rare."""

Around = Callable[[Any, Tensor, Any, Callable[..., Tensor], Callable[..., Tensor]], Tensor]
"""`(layer, tokens, inputs, enter, leave) -> tokens`: a layer and what joins it to the residual stream."""


def at_once(
    layer: Any, tokens: Tensor, inputs: Any, enter: Callable[..., Tensor], leave: Callable[..., Tensor]
) -> Tensor:
    """The plain `Around`: `enter(tokens, inputs)` goes through the layer, `leave(tokens, y, inputs)` adds it."""
    # Not layer(...): Module.__call__ would hold what enters until the layer is through, a sixth of all that is alive.
    return leave(tokens, layer.forward(enter(tokens, inputs), inputs), inputs)


def may_write() -> bool:
    """Whether a tensor may be changed where it stands: nobody differentiates, and no compiler plans the memory."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def run_length(x: Tensor) -> int:
    """How many tokens of x [B, L, ...] make a temporary of RUN_VALUES."""
    return max(1, RUN_VALUES * x.shape[1] // max(1, x.numel()))


def runs(length: int, size: int) -> Iterator[slice]:
    """0..length in slices of `size`; the last one may be shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def in_runs(fn: Callable[[slice], Tensor], like: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """What `fn` makes of tokens, of the shape of `like` [B, L, ...]; long sequences run by run, into `out` if given.

    `fn` gets the slice of L it shall compute, in any dtype; all values are the same as those of one call for all.
    """
    if like.numel() <= RUN_VALUES or not may_write():
        return fn(slice(None)).to(dtype)
    out = torch.empty(like.shape, dtype=dtype, device=like.device) if out is None else out
    for at in runs(like.shape[1], run_length(like)):
        out[:, at] = fn(at)
    return out


def accumulate(x: Tensor, y: Tensor) -> Tensor:
    """x + y in x's dtype, [B, L, D]; written into `x` where that is allowed."""
    return x.add_(y) if may_write() else (x + y).to(x.dtype)
