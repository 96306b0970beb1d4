"""Operations that may be computed in more than one way: a PyTorch body, which defines each, and who stands in for it.

Models call the operation and never a kernel. Which kernel runs is decided once for a whole run (`providers`), so a call
asks nothing but whether there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from wan.engine.ops.rows import may_write

__all__ = ["Draw", "Examples", "Kernel", "Op", "computed_by", "op"]

P = ParamSpec("P")
R = TypeVar("R")

Kernel = Callable[..., Any]
"""Takes an operation's arguments and gives its result, or NotImplemented for arguments it is not written for.

It may write what the operation may write, and is called only where that is allowed: without gradients, uncompiled.
"""

Draw = Callable[..., Tensor]
"""`draw(*shape, dtype=torch.float32)`: the next normal random numbers."""

Examples = Callable[[Draw], Sequence[tuple[Any, ...]]]
"""Arguments of a few small calls that every kernel of an operation has to serve."""


class Op(Generic[P, R]):
    """A function whose body is PyTorch; it runs everywhere, and every kernel is held to it."""

    def __init__(self, definition: Callable[P, R], examples: Examples, tolerance: float) -> None:
        update_wrapper(self, definition)
        self.name = definition.__name__
        self.definition = definition
        self.examples = examples
        self.tolerance = tolerance
        """Relative L2 distance to the definition that a kernel's results on the examples may have."""
        self.kernel: Kernel | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.kernel is not None and may_write():
            made: R = self.kernel(*args, **kwargs)
            if made is not NotImplemented:
                return made
        return self.definition(*args, **kwargs)

    def calls(self, device: torch.device) -> Iterator[tuple[Any, ...]]:
        """The examples' arguments on a device, the same numbers every time."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        yield from self.examples(draw)


def op(*, examples: Examples, tolerance: float) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes a function that operation of which it is the definition."""
    return lambda definition: Op(definition, examples, tolerance)


@contextmanager
def computed_by(kernels: Mapping[Op[..., Any], Kernel]) -> Iterator[None]:
    """Let these operations be computed by these kernels while the context is open, for the whole process."""
    before = {each: each.kernel for each in kernels}
    try:
        for each, kernel in kernels.items():
            each.kernel = kernel
        yield
    finally:
        for each, was in before.items():
            each.kernel = was
