"""The dtype of the DiT's weights, which is also the dtype it computes in, and that of the tokens between its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.types import EXPERTS

if TYPE_CHECKING:
    from wan.engine.engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Precision(Optimization):
    """Store the DiT's small float32 parts like the rest (`convert_model_dtype`), or the rest in another dtype.

    Plain are the task's `param_dtype` (bfloat16) for Linear and Conv weights and float32 for norms, modulation, time
    embedding and head. Whatever their storage, those parts and the residual stream compute in float32; the matrix
    products compute in `param_dtype`. float32 is for comparisons, float16 for cards without bfloat16. Tensors are
    converted one by one while they are read.
    """

    order = Order.DTYPE
    grade = "lossy"
    tolerance = 0.05
    cost = "nothing; float32 takes twice the memory of bfloat16"
    convert_model_dtype: bool = option(False, "store all weights of the DiT in its param_dtype, norms and head too")
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the DiT's matrices (default: the task's, bfloat16)"
    )

    @property
    def enabled(self) -> bool:
        return self.convert_model_dtype or self.param_dtype is not None

    def convert(self, module: nn.Module, name: str) -> None:
        if name not in EXPERTS:
            return
        keeps_float32: Callable[[str], bool] = module.float32_keys  # type: ignore[assignment]
        plain = next(p.dtype for key, p in module.named_parameters() if not keeps_float32(key))
        dtype = plain if self.param_dtype is None else DTYPES[self.param_dtype]
        for key, parameter in module.named_parameters():
            if parameter.is_floating_point() and (self.convert_model_dtype or not keeps_float32(key)):
                parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True, kw_only=True)
class ResidualPrecision(Optimization):
    """Keep the tokens between the transformer's blocks, to which each layer adds, in 16 bits in place of 32.

    Half the memory of that stream (14B at 1280x720x81: 0.8 GB in place of 1.5, computed) and half of what is read and
    written for it. Norms and sums are computed in float32 as before, but each sum is rounded to eight bits;
    tools/measure_options.py says what that does to the demo's clips.
    """

    order = Order.DTYPE
    grade = "lossy"
    tolerance = 0.05
    cost = "nothing"
    residual_dtype: Literal["float32", "bfloat16"] = option("float32", "dtype of the tokens between the DiT's blocks")

    @property
    def enabled(self) -> bool:
        return self.residual_dtype != "float32"

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name in EXPERTS:
            dit: Any = module
            dit.stream_dtype = DTYPES[self.residual_dtype]
