"""Watches a denoise without making the device wait: every reading is looked at one step after it was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan.engine.errors import NonFinite
from wan.engine.types import Progress, Step


@dataclass
class Monitor:
    """An `observe` callback: reports step times and stops the run when the latents are no longer finite."""

    progress: Progress
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per expert, the duration of each of its steps."""
    steps: Sequence[Step] = ()
    """All steps of the run."""
    share: Callable[[Step], float] = lambda step: 1.0
    """What part of a step's forwards is run."""
    _pending: tuple[Step, Tensor, torch.cuda.Event | None] | None = None
    _since: torch.cuda.Event | float | None = None

    def start(self, latents: Tensor) -> None:
        """Begin timing; called before the first step of each segment."""
        self.flush()
        self._since = _now(latents)

    def __call__(self, step: Step, latents: Tensor) -> None:
        finite = torch.isfinite(latents).all()
        event = _now(latents)
        if isinstance(event, float):
            self._report(step, finite, event, event - _seconds(self._since))
            return
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(finite, non_blocking=True)
        event.record()
        self.flush()
        self._pending = (step, flag, event)

    def flush(self) -> None:
        """Look at the last reading; raises NonFinite if it was broken."""
        if self._pending is None:
            return
        step, flag, event = self._pending
        self._pending = None
        assert event is not None and isinstance(self._since, torch.cuda.Event)
        event.synchronize()
        self._report(step, flag, event, self._since.elapsed_time(event) / 1000)

    def _report(self, step: Step, finite: Tensor, now: torch.cuda.Event | float, seconds: float) -> None:
        if not finite:
            raise NonFinite(
                f"the latents hold NaN or infinity after step {step.index + 1} of {step.count} "
                f"(expert {step.expert!r}, t={step.t:g}). Likely causes: {_causes(step)}."
            )
        self._since = now
        self.seconds.setdefault(step.expert, []).append(seconds)
        self.progress.step(step, seconds, self.share(step), sum(map(self.share, self.steps[step.index + 1 :])))


def _causes(step: Step) -> str:
    overflow = (
        "weights or activations overflow their dtype (try --param_dtype bfloat16 or float32, and --attention sdpa)"
    )
    if step.index == 0:
        return f"a damaged or wrong checkpoint, or {overflow}"
    return f"{overflow}, or a guidance scale or shift far from the model's defaults"


def _now(latents: Tensor) -> torch.cuda.Event | float:
    if not latents.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(since: torch.cuda.Event | float | None) -> float:
    assert isinstance(since, float)
    return since


class Silent:
    """A `Progress` that says nothing."""

    def stage(self, name: str, detail: str = "") -> None: ...

    def step(self, step: Step, seconds: float, share: float, ahead: float) -> None: ...

    def note(self, text: str) -> None: ...
