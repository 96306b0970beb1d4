"""What every option that compiles has in common: what the compiler needs, and room for all it will make."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from wan.engine.errors import MissingPackage, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.plan import Optimization, Order, switch_flag


class Compiled(Optimization):
    """An option that compiles parts of a network with torch.compile, each without graph breaks."""

    order = Order.COMPILE
    grade = "rounding"
    tolerance = 1e-2
    backend: ClassVar[str] = "inductor"

    def check(self, hardware: Hardware) -> None:
        """Raise what is missing for compiling on this hardware."""
        flag = switch_flag(type(self))
        if self.backend != "inductor":
            return
        if hardware.is_cuda and hardware.sm < (7, 0):
            raise UnsupportedHardware(f"{flag} needs sm_70 or newer, this is {hardware}. Use {_off(flag)}.")
        if hardware.is_cuda and hardware.here and importlib.util.find_spec("triton") is None:
            raise MissingPackage(f"{flag} needs the package triton, which is not installed: pip install triton")
        if not hardware.is_cuda and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise MissingPackage(f"{flag} on a CPU needs a C++ compiler and none is on the PATH. Use {_off(flag)}.")


@contextmanager
def room_for_forms(forms: int) -> Iterator[None]:
    """Let that many compilations of one piece of code live side by side; PyTorch's default is 8."""
    config = torch._dynamo.config
    together = max(config.accumulated_recompile_limit, forms)
    with config.patch(recompile_limit=max(config.recompile_limit, forms), accumulated_recompile_limit=together):
        yield


def _off(flag: str) -> str:
    return flag.replace("--", "--no-", 1)
