"""Networks that leave the GPU when they have done their part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan.engine.options import option
from wan.engine.placement import Policy
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Offload(Optimization):
    """Keep the DiT and the encoders in pinned RAM and on the GPU only while they compute.

    Of two experts only the needed one is on the GPU; the encoders of text, images and sound have left before the DiT
    enters. The VAE stays, as in the original code; `vae_cpu` moves it too. Costs one transfer of each network per
    video. On a CPU there is nothing to move. `generate` has its own default, True.
    """

    order = Order.PLACEMENT
    grade = "bitwise"
    cost = "RAM for the networks; one transfer of each a video"
    per_call = True
    offload_model: bool | None = option(
        None,
        "keep the DiT and the encoders in RAM except while they compute (generate.py: True for one process)",
        off=("--no-offload", "--no-offload_model"),
        takes_bool=True,
    )

    def apply(self, engine: Engine) -> None:
        for name in engine.placement.names:
            # What another option has placed (the text encoder on the CPU) stays as it placed it.
            if name != "vae" and engine.placement.policy(name) is Policy.RESIDENT:
                engine.set_policy(name, Policy.AFTER_USE)
