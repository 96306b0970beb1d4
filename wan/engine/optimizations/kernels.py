"""Who computes the operations between matrix products and attention."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from wan.engine.hardware import Hardware
from wan.engine.ops.op import computed_by
from wan.engine.ops.providers import choose, refusal
from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Kernels(Optimization):
    """Compute norms, modulation, residuals, rotary embedding and 8-bit rounding by fused kernels instead of PyTorch.

    A kernel reads and writes memory once where PyTorch does so for every step; sums are taken in another order. "auto"
    takes every kernel that works here; a named kind that cannot run here is refused. Each is tried on small inputs
    first: one that is wrong or fails is left out with a warning. Compiled blocks keep the compiler's own
    kernels. There is no off spelling: plain is "torch". See docs/kernels.md.
    """

    order = Order.RUNTIME
    grade = "rounding"
    tolerance = 1e-2
    cost = "nothing but the first call, which compiles them"
    per_call = True
    kernels: Literal["torch", "auto", "triton", "cuda", "cpu"] = option(
        "torch", "who computes norms, residuals and the like"
    )

    @property
    def enabled(self) -> bool:
        return self.kernels != "torch"

    def check(self, hardware: Hardware) -> None:
        if (refused := refusal(self.kernels, hardware)) is not None:
            raise refused

    def apply(self, engine: Engine) -> None:
        engine.during_run(partial(_chosen, self.kernels, engine.hardware))


@contextmanager
def _chosen(name: str, hardware: Hardware) -> Iterator[None]:
    chosen = choose(name, hardware)
    told = ", ".join(f"{each.name} {provider}" for each, (provider, _) in chosen.items())
    logging.getLogger(__name__).info("kernels: %s", told or "none but PyTorch's own")
    with computed_by({each: kernel for each, (_, kernel) in chosen.items()}):
        yield
