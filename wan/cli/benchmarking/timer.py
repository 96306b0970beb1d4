"""Points in time on whatever device computes: CUDA events on a GPU, which do not make it wait, a clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in time. `until` waits for the device and gives seconds."""

    def until(self, later: Any) -> float: ...


@dataclass(frozen=True)
class Instant:
    """A reading of the host's clock."""

    at: float

    def until(self, later: Instant) -> float:
        return later.at - self.at


class OnDevice:
    """A point in the queue of a GPU."""

    def __init__(self, event: Any = None) -> None:
        self.event = event or torch.cuda.Event(enable_timing=True)
        self.event.record()

    def until(self, later: OnDevice) -> float:
        later.event.synchronize()
        return float(self.event.elapsed_time(later.event)) / 1000


def timer(device: torch.device) -> Callable[[], Mark]:
    """What to call for a mark of now."""
    return OnDevice if device.type == "cuda" else lambda: Instant(time.perf_counter())
