"""Which kernel computes attention."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from wan.engine.engine import main_dtype
from wan.engine.hardware import Hardware
from wan.engine.ops import attention as backends
from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine

WAN_HEAD_DIM = 128
"""Of all published models: what a backend is asked for before the checkpoint has been opened."""


@dataclass(frozen=True, kw_only=True)
class Attention(Optimization):
    """Compute attention with another kernel than PyTorch's own choice.

    "auto" takes the fastest exact backend for this card, dtype and installation and logs which and why; generate.py
    uses it; a kernel that fails, or gives other values than PyTorch's, is replaced by the next best with a warning.
    "flash3_fp8" and "sage" compute self-attention in 8 bits and are never chosen by themselves; other attention stays
    exact. A backend that cannot run here is refused before weights are read. There is no off spelling: plain is "sdpa".
    """

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 1e-2
    cost = "nothing; other packages have to be installed"
    attention: Literal["auto", "sdpa", "cudnn", "flash2", "flash3", "flash3_fp8", "sage"] = option(
        "sdpa", "attention backend"
    )

    @property
    def enabled(self) -> bool:
        return self.attention != "sdpa"

    def check(self, hardware: Hardware) -> None:
        if self.attention in backends.BACKENDS:
            refusal = backends.BACKENDS[self.attention].refusal(hardware, torch.bfloat16, WAN_HEAD_DIM)
            if refusal is not None:
                raise refusal

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name not in engine.expert_names:
            return
        # Those with a window of their own keep the path that knows it.
        seams: list[tuple[Any, str]] = [
            (part, seam) for part in module.modules() for seam, value in vars(part).items() if value is backends.sdpa
        ]
        here = engine.hardware, main_dtype(module), seams[0][0].head_dim if seams else WAN_HEAD_DIM
        chosen, attend, reason = backends.choose(self.attention, *here)
        exact = attend if backends.is_exact(chosen) else backends.choose("auto", *here)[1]
        for layer, seam in seams:
            setattr(layer, seam, attend if layer.role == "self" else exact)
        engine.kernels[name] = chosen
        logging.getLogger(__name__).info("attention of %s: %s (%s)", name, chosen, reason)
