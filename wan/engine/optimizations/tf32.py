"""TensorFloat-32 for float32 products on NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class TF32(Optimization):
    """Multiply float32 matrices and convolutions in TF32 (10-bit mantissa) on tensor cores, sm_80 and newer.

    Speeds up what runs in float32: the VAE, and the DiT with `param_dtype` float32. Not set, PyTorch's settings are
    left alone, as the original code does: convolutions in TF32, matrix products in full float32. Off switches both
    to full float32. A setting of the whole process. Source: docs.pytorch.org, "CUDA semantics", TensorFloat-32.
    """

    order = Order.RUNTIME
    grade = "rounding"
    tolerance = 1e-2
    tf32: bool | None = option(None, "TF32 for float32 products on the GPU (off: full float32 in convolutions too)")

    @property
    def enabled(self) -> bool:
        return self.tf32 is not None

    def apply(self, engine: Engine) -> None:
        torch.backends.cuda.matmul.allow_tf32 = bool(self.tf32)
        torch.backends.cudnn.allow_tf32 = bool(self.tf32)
