"""The text encoder on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan.engine.options import option
from wan.engine.placement import Policy
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class T5CPU(Optimization):
    """Run the text encoder on the CPU: 11 GB of GPU memory are never needed, encoding takes seconds to minutes.

    Embeddings differ from the GPU's by rounding. It never enters the GPU, whatever `offload_model` says.
    """

    order = Order.PLACEMENT
    grade = "rounding"
    tolerance = 1e-2
    cost = "seconds to minutes a text, on the CPU"
    per_call = True
    t5_cpu: bool = option(False, "compute the text embeddings on the CPU")

    def apply(self, engine: Engine) -> None:
        engine.set_policy("text_encoder", Policy.ON_CPU)
