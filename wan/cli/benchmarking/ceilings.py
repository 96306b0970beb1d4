"""What this machine can do at best, measured on the spot, so that a row can say how much of it was used.

A card's data sheet is reached by no program: clocks fall under load, and libraries differ. Utilisation is therefore
told of the rate at which this PyTorch multiplies large matrices here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wan.cli.benchmarking.timer import timer

REPEATS = 5
_SIZES = {"cuda": (8192, 20, 2**30), "cpu": (1024, 2, 2**26)}
"""Device -> side of the square matrices, products timed together, bytes of the copy."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The best of a few measurements. `dtype` is that of the matrix products."""

    dtype: str
    matmul_tflops: float
    copy_gb_s: float
    """Bytes read and written per second of a copy inside the device's memory."""


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes about a second."""
    side, together, num_bytes = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    product = _best(device, lambda: [torch.mm(a, b, out=out) for _ in range(together)]) / together
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(device, lambda: target.copy_(source))
    return Ceilings(
        dtype=str(dtype).removeprefix("torch."),
        matmul_tflops=2 * side**3 / product / 1e12,
        copy_gb_s=2 * num_bytes / copy / 1e9,
    )


def _best(device: torch.device, act: Callable[[], object]) -> float:
    """Seconds of the fastest of `REPEATS`, after one that warms up."""
    now = timer(device)
    act()
    seconds = []
    for _ in range(REPEATS):
        before = now()
        act()
        seconds.append(before.until(now()))
    return min(seconds)
