"""torch.compile, block by block."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from wan.engine.errors import MissingPackage, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine

RECOMPILE_LIMIT = 64
"""Blocks share one code object: block forms x sizes x dtypes must stay below this (PyTorch's default is 8)."""


@dataclass(frozen=True, kw_only=True)
class Compile(Optimization):
    """Compile each transformer block with torch.compile, without graph breaks.

    All blocks share one compilation, so the first step takes seconds to a minute more and a new size compiles once
    again. The reduce-overhead and max-autotune modes use CUDA graphs: for small models, where launching kernels costs
    more than they do; offloading makes them record again. Results differ by rounding.
    """

    order = Order.COMPILE
    grade = "rounding"
    tolerance = 1e-2
    backend: ClassVar[str] = "inductor"
    compile: bool = option(False, "compile the transformer blocks")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "default", "how torch.compile optimises"
    )

    def check(self, hardware: Hardware) -> None:
        if self.backend != "inductor":
            return
        if hardware.is_cuda and hardware.sm < (7, 0):
            raise UnsupportedHardware(f"--compile needs sm_70 or newer, this is {hardware}. Use --no-compile.")
        if hardware.is_cuda and importlib.util.find_spec("triton") is None:
            raise MissingPackage("--compile needs the package triton, which is not installed: pip install triton")
        if not hardware.is_cuda and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise MissingPackage("--compile on a CPU needs a C++ compiler and none is on the PATH. Use --no-compile.")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name not in engine.expert_names:
            return
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        for block in module.all_blocks():  # type: ignore[operator]
            block.compile(fullgraph=True, backend=self.backend, mode=self.compile_mode)
        if engine.device.type == "cuda" and self.compile_mode in ("reduce-overhead", "max-autotune"):
            module.trunk = _one_graph_step(module.trunk)  # type: ignore[assignment,arg-type]


def _one_graph_step(trunk: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`trunk` as one step of CUDA graphs: memory of one block's result is reused in the next forward, not block."""

    def run(*args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # The result lies in the graphs' memory, which the next forward (the other branch) would overwrite.
        return trunk(*args).clone()

    return run
