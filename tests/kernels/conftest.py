"""Triton kernels without a GPU: run in its interpreter, or compiled for a card that need not be there.

Which of the two is settled when a kernel's source is imported, so each test has the sources imported anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SOURCES = ("launching", "quantize", "modulate", "rope", "video")


@contextmanager
def imported(interpret: bool) -> Iterator[SimpleNamespace]:
    """The sources of all kernels by name, for the interpreter or the compiler."""
    triton = pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-dev.txt")
    import_module("triton.experimental.gluon")  # part of both, and made for the compiler
    forget()
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = interpret
    try:
        yield SimpleNamespace(**{name: import_module(f"wan.kernels.{name}") for name in SOURCES})
    finally:
        triton.knobs.runtime.interpret = before
        forget()


def forget() -> None:
    import wan.kernels

    for name in SOURCES:
        sys.modules.pop(f"wan.kernels.{name}", None)
        vars(wan.kernels).pop(name, None)


def narrowed(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
    """`values` of Triton's type `given` as numbers of the type `wanted`, to the nearest, as bits."""
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[wanted.primitive_bitwidth // 8]
    numbers = torch.frombuffer(bytearray(values.tobytes()), dtype=types[given.name])
    return numbers.to(types[wanted.name]).view(bits).numpy().reshape(values.shape)


@contextmanager
def restored(*owners: Any) -> Iterator[None]:
    """What is in these modules and classes is put back: the interpreter leaves its own behind in Triton's language."""
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, was in zip(owners, before, strict=True):
        for name, value in was.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The kernels in Triton's interpreter, on CPU tensors; new tensors are full of NaN.

    The interpreter cuts off what a card rounds to the nearest (bfloat16), or carries wrongly (e4m3): that one function
    is replaced.
    """
    with imported(interpret=True) as sources, torch.inference_mode(), np.errstate(over="ignore"), ExitStack() as after:
        interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language")
        after.enter_context(restored(language, language.core, language.math, language.standard, language.tensor))
        for module in (language, language.standard):  # Triton's own functions were made for the compiler
            for name, value in list(vars(module).items()):
                if isinstance(value, import_module("triton.runtime.jit").JITFunction):
                    monkeypatch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
        monkeypatch.setattr(interpreter, "_convert_float", narrowed)
        torch._C._set_deterministic_algorithms(True)  # has torch.empty filled; the public switch imports the compiler
        yield sources
        torch._C._set_deterministic_algorithms(False)


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    registers: int
    stack: int
    shared: int
    local: int
    loads: tuple[int, ...]
    """Bytes of each load from global memory, a thread."""
    stores: tuple[int, ...]


@pytest.fixture
def code_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Code]]:
    """`code_for(sm, call)`: the code that the one kernel `call(sources)` launches would have there.

    Everything is as on a card, specialisation for aligned pointers and divisible sizes too, but the launch.
    """
    pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-dev.txt")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **kwargs))

    def code(sm: int, call: Callable[[SimpleNamespace], Any]) -> Code:
        compiled.clear()
        card = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", sm, 32),
            get_current_device=lambda: sm,
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(driver, "_active", card)
        call(sources)
        (kernel,) = compiled
        (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(tmp_path / "cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
        assert used, report
        return Code(*map(int, used.groups()), *(widths(kernel.asm["ptx"], what) for what in ("ld", "st")))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    with imported(interpret=False) as sources:
        monkeypatch.setattr(sources.launching, "INTERPRETED", True)  # tensors need not be on a card
        yield code


def widths(ptx: str, what: str) -> tuple[int, ...]:
    """Bytes a thread moves with each access to global memory in the code."""
    found = re.findall(rf"\b{what}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return tuple(int(count or 1) * int(bits) // 8 for count, bits in found)
