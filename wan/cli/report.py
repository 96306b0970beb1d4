"""What the user sees: a start that says what was chosen and why, progress by stage, an end with times and the path.

All of it goes to standard error; standard output carries the path of the result alone, for scripts.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self, TextIO

from wan.cli.few_step import in_few_steps

if TYPE_CHECKING:
    from wan.cli.presets import Preset
    from wan.cli.request import Wanted
    from wan.engine.accounting import Report
    from wan.engine.hardware import Hardware
    from wan.engine.plan import Plan
    from wan.engine.types import Step

LINES_IN_A_LOG = 10


class Terminal:
    """A `Progress` that writes lines: one that is redrawn on a terminal, about ten in a log file."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stream = stream or sys.stderr
        self.clock = clock
        self.live = self.stream.isatty()
        self.stages: list[tuple[str, float]] = []
        """(name, seconds) of the stages done, in order."""
        self._stage: tuple[str, float] | None = None
        self._steps: list[tuple[float, float]] = []
        self._open_line = False

    def stage(self, name: str, detail: str = "") -> None:
        """A stage begins, and with it the one before ends."""
        self.end_stage()
        self._stage = (name, self.clock())
        self._line(f"{name}{': ' + detail if detail else ''} ...")

    def step(self, step: Step, seconds: float, share: float, ahead: float) -> None:
        """One solver step is done: k of n, seconds per step, time left."""
        done = step.index + 1
        if step.index == 0:
            self._steps = []
        self._steps.append((seconds, share))
        each = pace(*zip(*self._steps, strict=True))
        text = f"  step {done}/{step.count}  {each:.2f} s/it  ETA {clock_time(each * ahead)}"
        if share == 0:
            text += "  (reused)"
        if step.expert != "dit":
            text += f"  ({step.expert} noise)"
        if self.live:
            self._write(f"\r{text:<70}")
            self._open_line = True
        elif done * LINES_IN_A_LOG // step.count > (done - 1) * LINES_IN_A_LOG // step.count:
            self._line(text)

    def note(self, text: str) -> None:
        """Something worth knowing that is not an error."""
        self._line(f"note: {text}")

    def line(self, text: str) -> None:
        self._line(text)

    @property
    def current(self) -> str:
        """Name of the stage that is running."""
        return self._stage[0] if self._stage else "start"

    def end_stage(self) -> None:
        """The current stage, if any, is over."""
        if self._stage is not None:
            name, since = self._stage
            self.stages.append((name, self.clock() - since))
            self._stage = None

    def end_line(self) -> None:
        """A line that is being redrawn stays as it is."""
        if self._open_line:
            self._open_line = False
            self._write("\n")

    def spent(self) -> float:
        """Seconds of all stages so far."""
        running = 0.0 if self._stage is None else self.clock() - self._stage[1]
        return sum(seconds for _, seconds in self.stages) + running

    def times(self) -> str:
        """Seconds per stage, equal names added up."""
        total: dict[str, float] = {}
        for name, seconds in self.stages:
            total[name] = total.get(name, 0.0) + seconds
        parts = [f"{name} {seconds:.1f} s" for name, seconds in total.items()]
        return ", ".join(parts) + f"; {sum(total.values()):.1f} s in all"

    def _line(self, text: str) -> None:
        lead = "\n" if self._open_line else ""
        self._open_line = False
        self._write(f"{lead}{text}\n")

    def _write(self, text: str) -> None:
        """A terminal that has gone, or a log on a full disk, must not cost the video."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()

    def failed(self, text: str) -> None:
        """The one line of an error."""
        self._line("error: " + " ".join(text.split()))


class Notes(logging.Handler):
    """Shows what the engine logs (which attention kernel it took and why, ...) between the lines of a `Terminal`."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.note(record.getMessage())

    def __enter__(self) -> Self:
        logger = logging.getLogger("wan")
        self._before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logger = logging.getLogger("wan")
        logger.removeHandler(self)
        logger.setLevel(self._before)


def clock_time(seconds: float) -> str:
    """75 as 1:15, 3700 as 1:01:40."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def start_lines(wanted: Wanted, plan: Plan, hardware: Hardware, preset: Preset | None = None) -> list[str]:
    """What was chosen, and why."""
    why = wanted.why
    seconds = wanted.num_frames / wanted.fps
    scale = wanted.guide_scale
    if isinstance(scale, tuple):
        scales = f"{scale[0]:g}" if scale[0] == scale[1] else f"{scale[0]:g} low, {scale[1]:g} high noise"
    else:
        scales = f"{scale:g}"
    frames = f"{wanted.num_frames} frames ({why['frames']}) at {wanted.fps} fps = {seconds:.1f} s"
    plain = f"{wanted.steps} steps of {wanted.solver}, shift {wanted.shift:g}, guidance {scales}"
    return [
        f"task    {wanted.task} ({why['task']}) from {_source(wanted)}",
        f"prompt  {wanted.prompt!r} ({why['prompt']})",
        f"video   {wanted.width}x{wanted.height} ({why['size']}), {'one image' if wanted.num_frames == 1 else frames}",
        f"sample  {in_few_steps(wanted, plan) or plain}, seed {wanted.seed} ({why['seed']})",
        *([] if preset is None else preset.lines()),
        f"run     on {hardware}; {plan.describe()}",
    ]


def end_lines(report: Report, peak_bytes: int | None, hardware: Hardware) -> list[str]:
    """What the run did: forwards, pace and memory. A count that is not the planned one never comes so far."""
    forwards = report.describe_forwards()
    instead = "" if (saved := report.saved_forwards()) is None else f"; {saved[0]} in place of the plain {saved[1]}"
    ran = f"forwards {forwards}, as planned{instead}" if forwards else "no forward: the latents were there"
    lines = [f"ran     {ran}"]
    experts = [
        f"{name} {len(seconds)} steps in {sum(seconds):.1f} s, {pace(seconds):.2f} s/step"
        for name, seconds in report.step_seconds.items()
    ]
    lines += [f"pace    {'; '.join(experts)}"] if experts else []
    where = "allocated on the GPU" if hardware.is_cuda else "of RAM in use"
    return lines + ([f"memory  at most {peak_bytes / 2**30:.2f} GiB {where}"] if peak_bytes is not None else [])


def pace(seconds: Sequence[float], shares: Sequence[float] | None = None) -> float:
    """Seconds per step, or per whole step where only `shares` of them were run.

    Without the first one when there are others: it also warms up.
    """
    whole = list(shares or (1.0,) * len(seconds))
    first = 1 if sum(whole[1:]) else 0
    return sum(seconds[first:]) / max(1.0, sum(whole[first:]))


def _source(wanted: Wanted) -> str:
    """Where the weights come from: a repository or folder, files in place of what it holds."""
    if wanted.load_format == "dummy":
        return "random weights (--load_format dummy)"
    place = wanted.repository.name if wanted.repository is not None else str(wanted.checkpoint or "")
    given = {} if wanted.files is None else wanted.files.named()
    files = ", ".join(f"--{name} {path}" for name, path in given.items())
    return " with ".join(filter(None, (place, files)))
