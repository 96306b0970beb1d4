"""Rows of a measurement, written to a file after every one of them: a run that is cut off has lost nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import partly
import torch

from wan.cli.benchmarking.power import Sampler
from wan.cli.benchmarking.timer import timer

Act = Callable[[], Any]

FAULTS = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError, OSError)
"""What becomes a row that says so: a library that lacks a kernel, a card that lacks memory."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an act does at least: FLOP, bytes moved, and where it differs from the exact path, by how much."""

    flop: float = 0.0
    bytes: float = 0.0
    distance: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One act at one size. `key` is what predictions name it by; no seconds where it `failed`."""

    key: str
    seconds: tuple[float, ...] = ()
    work: Work = Work()
    peak_bytes: int | None = None
    power: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def told(self) -> dict[str, Any]:
        """The row as it is written: rates are of the median."""
        seconds = self.median
        rates = {
            "tflops": self.work.flop / seconds / 1e12 if seconds and self.work.flop else None,
            "gb_s": self.work.bytes / seconds / 1e9 if seconds and self.work.bytes else None,
        }
        return {**asdict(self), "median_s": seconds, **rates}


class Book:
    """A file of rows. Acts are timed in turns, so that a card that gets hot slows all of them."""

    def __init__(self, path: Path, about: Mapping[str, Any], device: torch.device, budget_s: float) -> None:
        self.path, self.about, self.device = path, dict(about), device
        self.rows: list[Row] = []
        self._ends = time.monotonic() + budget_s

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()
        seconds = "-" if row.median is None else f"{row.median * 1e3:.3f} ms"
        print(f"{row.key}: {row.failed or seconds}", flush=True)

    def write(self) -> None:
        partly.write(self.path, {**self.about, "rows": [row.told() for row in self.rows]})

    def race(self, acts: Mapping[str, tuple[Act, Work]], runs: int) -> None:
        """`runs` turns of every act after one that warms up; each that fails, or has no time left, is a row too."""
        now = timer(self.device)
        seconds: dict[str, list[float]] = {key: [] for key in acts}
        peaks: dict[str, int | None] = {}
        failed: dict[str, str] = {}
        with Sampler(self.device) as sampler:
            for turn in range(runs + 1):
                for key, (act, _) in acts.items():
                    if key in failed:
                        continue
                    if time.monotonic() > self._ends:
                        failed.setdefault(key, "" if seconds[key] else "not run: the time was up")
                        continue
                    self._reset_peak()
                    try:
                        begun = now()
                        act()
                        took = begun.until(now())
                    except FAULTS as error:
                        failed[key] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                        continue
                    peaks[key] = self._peak()
                    if turn:
                        seconds[key].append(took)
        for key, (_, work) in acts.items():
            why = failed.get(key, "")
            self.add(Row(
                key=key, seconds=() if why else tuple(seconds[key]), work=work, peak_bytes=peaks.get(key),
                power=sampler.readings(), failed=why,
            ))  # fmt: skip

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; NaN anywhere gives NaN, which no limit is above."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())
