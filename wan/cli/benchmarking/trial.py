"""The nouns of a benchmark: what is timed, what a worker says of it, and the clock that divides a run into stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from wan.cli import memory

if TYPE_CHECKING:
    import numpy as np
    import torch

    from wan.cli.benchmarking.ceilings import Ceilings
    from wan.cli.benchmarking.timer import Mark
    from wan.engine.types import Step

Runs = Literal["wan", "diffusers", "diffusers_compiled", "upstream"]

STAGES = {"encode": "text", "denoise": "denoise", "decode": "decode"}
"""First word of an engine's stage -> column of the report. Pictures and sound are encoded in the text's column."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is timed. `dtype` None is the task's own; `optimized` False switches off all but where networks live.

    `words` are flags of generate.py beside those that all variants share.
    """

    name: str
    runner: Runs = "wan"
    optimized: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How every variant is run. `noise` is a file of latents to begin with, `upstream` a folder of Wan's own code."""

    threads: int | None = None
    noise: Path | None = None
    upstream: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a worker says when its networks are loaded. `hardware` is for reading, `machine` the record's tables."""

    plan: str
    hardware: str
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    ceilings: Ceilings


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is told to do: one run. `watch`: look inside it. `keep`: write its frames (uint8) to this file.

    `asked` are flags of generate.py, by their names in the namespace, that hold for this run in place of the worker's:
    what to make, and options of one call.
    """

    watch: bool = False
    keep: Path | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run, prompt to frames in memory. Seconds by stage and by network; bytes at their peaks.

    `forwards` counts passes through the transformers, 0 where a runner does not tell. `seen` holds what only a watched
    run tells, `readings` the driver's, `missing` why there are none. `cpu_seconds` are the process's own.
    """

    seconds: float
    stages: Mapping[str, float]
    components: Mapping[str, float]
    peaks: Mapping[str, int]
    latents: np.ndarray[Any, Any]
    forwards: int = 0
    steps: Mapping[str, float] = field(default_factory=dict)
    seen: Seen | None = None
    readings: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""
    cpu_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a watched run showed: see `wan.cli.benchmarking.watch.Watch`."""

    flop: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    velocity: np.ndarray[Any, Any] | None = None


class Runner(Protocol):
    """A pipeline with its networks loaded. `frames` are uint8 [N, H, W, 3] of the last run."""

    plan: str
    frames: torch.Tensor

    def run(self, watch: bool) -> Trial: ...

    def close(self) -> None: ...


class Clock:
    """A `Progress` that divides a run into stages; on a GPU it makes nothing wait until the run is over."""

    def __init__(self, device: torch.device, now: Callable[[], Mark] | None = None) -> None:
        from wan.cli.benchmarking.timer import timer

        self.device = device
        self._now = now or timer(device)
        self._marks: list[tuple[str, str, Mark]] = []

    def start(self) -> None:
        """A run begins."""
        memory.reset_peak(self.device)
        self._marks = [("text", "start", self._now())]

    def stage(self, name: str, detail: str = "") -> None:
        """The current stage ends and `name` begins."""
        network = detail.rpartition("with ")[2] if "with " in detail else ""
        kind = name.partition(" ")[0]
        self._marks.append((STAGES.get(kind, name), f"{name} {network}".strip(), self._now()))

    def step(self, step: Step, seconds: float, share: float, ahead: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self, latents: torch.Tensor, **more: Any) -> Trial:
        """The run is over; `latents` are the finished ones, `more` goes into the trial."""
        end = self._now()
        stages: Counter[str] = Counter()
        components: Counter[str] = Counter()
        after = [mark for _, _, mark in self._marks[1:]]
        for (stage, component, mark), following in zip(self._marks, [*after, end], strict=True):
            seconds: Any = mark.until(following)
            stages[stage] += seconds
            components[component] += seconds
        return Trial(
            seconds=sum(stages.values()),
            stages=dict(stages),
            components=dict(components),
            peaks=memory.peaks(self.device),
            latents=latents.detach().float().cpu().numpy().copy(),
            **more,
        )
