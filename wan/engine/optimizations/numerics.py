"""How PyTorch computes: switches of the whole process, which hold while a video is made and are then put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import REPEATABLE_CUBLAS, Hardware, fix_cublas_workspaces
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@contextmanager
def _holding(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, attribute, value): set on entering, put back on leaving."""
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


@dataclass(frozen=True, kw_only=True)
class TF32(Optimization):
    """Multiply float32 matrices and convolutions in TF32 (10-bit mantissa) on tensor cores, sm_80 and newer.

    Speeds up what runs in float32: the VAE, and the DiT with `param_dtype` float32. Not set, PyTorch's settings are
    left alone, as the original code does: convolutions in TF32, matrix products in full float32. Off switches both
    to full float32. Source: docs.pytorch.org, "CUDA semantics", TensorFloat-32.
    """

    order = Order.RUNTIME
    grade = "rounding"
    tolerance = 1e-2
    cost = "nothing"
    tf32: bool | None = option(None, "TF32 for float32 products on the GPU (off: full float32 in convolutions too)")

    @property
    def enabled(self) -> bool:
        return self.tf32 is not None

    def apply(self, engine: Engine) -> None:
        owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
        engine.during_run(partial(_holding, *((owner, "allow_tf32", bool(self.tf32)) for owner in owners)))


@dataclass(frozen=True, kw_only=True)
class BF16Reduction(Optimization):
    """Let matrix products in bfloat16 add up parts of a sum in bfloat16, where cuBLAS splits one.

    Not set, PyTorch's setting is left alone, as the original code does: allowed. Off keeps every sum in float32.
    Source: docs.pytorch.org, "CUDA semantics", reduced precision reduction in BF16 GEMMs.
    """

    order = Order.RUNTIME
    grade = "rounding"
    tolerance = 1e-2
    cost = "nothing; off it is slower where cuBLAS splits sums"
    bf16_reduced_precision: bool | None = option(None, "bfloat16 products on the GPU may add up parts in bfloat16")

    @property
    def enabled(self) -> bool:
        return self.bf16_reduced_precision is not None

    def apply(self, engine: Engine) -> None:
        matmul = torch.backends.cuda.matmul
        allowed = "allow_bf16_reduced_precision_reduction", bool(self.bf16_reduced_precision)
        engine.during_run(partial(_holding, (matmul, *allowed)))


@dataclass(frozen=True, kw_only=True)
class CudnnBenchmark(Optimization):
    """Let cuDNN time its algorithms for every new shape of a convolution and keep the fastest: those of the VAE.

    Trying them out takes time and memory once for every shape, and two runs may choose differently. The original code
    leaves it off. Source: docs.pytorch.org, "torch.backends", `torch.backends.cudnn.benchmark`.
    """

    order = Order.RUNTIME
    grade = "rounding"
    tolerance = 1e-2
    cost = "time and memory once for every shape"
    conflicts = (Conflict("Deterministic", "an algorithm chosen by timing is another one the next time"),)
    cudnn_benchmark: bool = option(False, "choose convolution algorithms by timing them")

    def apply(self, engine: Engine) -> None:
        engine.during_run(partial(_holding, (torch.backends.cudnn, "benchmark", True)))


@dataclass(frozen=True, kw_only=True)
class Deterministic(Optimization):
    """Use only algorithms that give the same bits every time, on the same card with the same software.

    An operation that has none is an error. On CUDA cuBLAS needs CUBLAS_WORKSPACE_CONFIG, which is set where the user
    has not; in a program of your own construct the pipeline before anything else multiplies matrices on the card.
    Compiled code is then chosen without timing it. Source: docs.pytorch.org, "Reproducibility".
    """

    order = Order.RUNTIME
    grade = "rounding"
    tolerance = 1e-2
    cost = "speed, where the repeatable algorithm is a slower one"
    deterministic: bool = option(False, "the same bits every time, or an error")

    def check(self, hardware: Hardware) -> None:
        # Here, as nothing comes earlier: a prompt may be extended on the card before the pipeline is made.
        found = fix_cublas_workspaces() if hardware.is_cuda else REPEATABLE_CUBLAS[0]
        if found not in REPEATABLE_CUBLAS:
            raise IncompatibleOptions(
                f"--deterministic needs CUBLAS_WORKSPACE_CONFIG={' or '.join(REPEATABLE_CUBLAS)}, but it is {found!r}: "
                "unset it"
            )

    def apply(self, engine: Engine) -> None:
        engine.during_run(_repeatable)


@contextmanager
def _repeatable() -> Iterator[None]:
    import torch._inductor.config as inductor

    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    # PyTorch's switch also sets the compiler's, which the user may have set apart.
    with _holding((cudnn, "deterministic", True), (cudnn, "benchmark", False), (inductor, "deterministic", True)):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
