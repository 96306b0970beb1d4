"""torch.compile, block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wan.engine.compiling import Compiled, room_for_forms
from wan.engine.errors import IncompatibleOptions, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Plan

if TYPE_CHECKING:
    from wan.engine.engine import Engine

RECOMPILE_LIMIT = 64
"""Blocks share one code object: block forms x sizes x dtypes must stay below this (PyTorch's default is 8)."""

WITH_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch.compile records CUDA graphs."""


@dataclass(frozen=True, kw_only=True)
class Compile(Compiled):
    """Compile each transformer block with torch.compile, without graph breaks.

    All blocks of one form share one compilation, those of two experts too, so the first step takes seconds to a minute
    more, which is told. Another prompt or seed compiles nothing. By default the first size is compiled for itself and
    the second for any size to come; `compile_dynamic` does the latter at once, `--no-compile_dynamic` compiles every
    size for itself. CUDA graphs (`cuda_graphs`, which is the mode reduce-overhead; max-autotune has them too) are for
    small models, where launching kernels costs more than they do; offloading makes them record again. Results differ
    by rounding.
    """

    cost = "seconds to a minute in the first step of a new size; a residual stream more"
    compile: bool = option(False, "compile the transformer blocks")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "default", "how torch.compile optimises"
    )
    cuda_graphs: bool | None = option(
        None, "replay compiled blocks as CUDA graphs (off: never; not set: as compile_mode has it)"
    )
    compile_dynamic: bool | None = option(
        None, "one code for all sizes (off: one for each size; not set: from the second size on)"
    )

    @property
    def enabled(self) -> bool:
        return self.compile or bool(self.cuda_graphs)  # graphs alone are refused, not ignored

    @property
    def mode(self) -> str:
        """What torch.compile is given: `compile_mode`, with CUDA graphs where they are asked for."""
        return "reduce-overhead" if self.cuda_graphs and self.compile_mode == "default" else self.compile_mode

    def check(self, hardware: Hardware) -> None:
        self._check_graphs(hardware)
        super().check(hardware)

    def check_plan(self, plan: Plan) -> None:
        if self.mode in WITH_GRAPHS and plan.values().get("lora_mode") == "stream":
            flag = "--cuda_graphs" if self.cuda_graphs else f"--compile_mode {self.compile_mode}"
            raise IncompatibleOptions(
                f"{flag} and --lora_mode stream do not go together: a graph holds the addresses of weights, and those "
                "that are merged for a call lie elsewhere in the next. Use --lora_mode onthefly or merge."
            )

    def _check_graphs(self, hardware: Hardware) -> None:
        if self.cuda_graphs is None:
            return
        if self.cuda_graphs is not (self.mode in WITH_GRAPHS):
            flag = "--cuda_graphs" if self.cuda_graphs else "--no-cuda_graphs"
            raise IncompatibleOptions(f"{flag} and --compile_mode {self.compile_mode} contradict each other: give one")
        if self.cuda_graphs and not self.compile:
            raise IncompatibleOptions("--cuda_graphs replays what --compile makes: add --compile")
        if self.cuda_graphs and not hardware.is_cuda:
            raise UnsupportedHardware(f"--cuda_graphs needs a CUDA card, this is {hardware}. Use --no-cuda_graphs.")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name not in engine.expert_names:
            return
        for block in module.all_blocks():  # type: ignore[operator]
            block.compile(fullgraph=True, dynamic=self.compile_dynamic, backend=self.backend, mode=self.mode)
        if engine.device.type == "cuda" and self.mode in WITH_GRAPHS:
            module.trunk = _one_graph_step(module.trunk)  # type: ignore[assignment,arg-type]

    def apply(self, engine: Engine) -> None:
        engine.during_run(partial(room_for_forms, RECOMPILE_LIMIT))
        engine.wrap_trunk(lambda trunk, dit, segment: _timed(trunk, engine))


def _timed(trunk: Callable[..., Tensor], engine: Engine) -> Callable[..., Tensor]:
    """`trunk`, telling what it spent on compiling, where it did."""

    def run(*args: Any) -> Tensor:
        before, hits, misses = _spent()
        tokens = trunk(*args)
        after, hits_after, misses_after = _spent()
        if after > before:
            engine.report.compile_seconds += after - before
            kept = hits_after > hits and misses_after == misses
            logging.getLogger(__name__).info("compile: %.1f s %s", after - before, "from the cache" if kept else "cold")
        return tokens

    return run


def _spent() -> tuple[float, int, int]:
    """What this process has compiled so far: seconds, graphs found in the cache on the disk, graphs not found."""
    utils = torch._dynamo.utils
    found = utils.counters["inductor"]
    return utils.calculate_time_spent()["total_wall_time"], found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]


def _one_graph_step(trunk: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`trunk` as one step of CUDA graphs: memory of one block's result is reused in the next forward, not block."""

    def run(*args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # The result lies in the graphs' memory, which the next forward (the other branch) would overwrite.
        return trunk(*args).clone()

    return run
