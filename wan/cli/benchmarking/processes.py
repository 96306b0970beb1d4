"""Starts the workers of a cell and lets them run in turns, so that a machine that slows down slows all of them.

What one variant cannot do (it runs out of memory, its process dies) ends that variant; the others go on.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wan.cli.benchmarking.matrix import Cell
from wan.cli.benchmarking.trial import Order, Ready, Setting, Trial, Variant
from wan.cli.benchmarking.worker import serve
from wan.engine.errors import GenerationFailed, WanError


class Line(Protocol):
    """The end of a pipe that this process holds."""

    def send(self, order: Any) -> None: ...

    def recv(self) -> Any: ...


OpenWorker = Callable[[Variant, Sequence[str], Setting], AbstractContextManager[Line]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often every variant runs, and whether one after the other instead of in turns."""

    num_runs: int = 3
    warmup: int = 1
    blocked: bool = False


@dataclass
class Outcome:
    """What became of one variant. `watched` is its first run, `frames` the file of the last one's, `keep` its name."""

    variant: Variant
    keep: Path
    ready: Ready | None = None
    watched: Trial | None = None
    trials: list[Trial] = field(default_factory=list)
    frames: Path | None = None
    failure: WanError | None = None


@contextmanager
def open_worker(variant: Variant, words: Sequence[str], setting: Setting) -> Iterator[Line]:
    """A process that serves `variant`, ended on leaving."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, variant, tuple(words), setting), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with suppress(OSError):  # it has gone already, and why has been told
            ours.send(None)
        ours.close()
        process.join(timeout=30)
        process.kill()


def measure(
    cell: Cell, setting: Setting, schedule: Schedule, scratch: Path, start: OpenWorker = open_worker
) -> list[Outcome]:
    """The outcome of every variant of `cell`; frames of the last runs go to the folder `scratch`."""
    outcomes = [Outcome(variant, scratch / f"{place}.npy") for place, variant in enumerate(cell.variants)]
    for group in [[outcome] for outcome in outcomes] if schedule.blocked else [outcomes]:
        with ExitStack() as stack:
            lines: dict[str, Line] = {}
            for outcome in group:
                variant = outcome.variant
                say(f"loading {variant.name} ...")
                lines[variant.name] = stack.enter_context(start(variant, cell.words, setting))
                with _ending(outcome):
                    outcome.ready = receive(lines[variant.name], variant)
            for number in range(schedule.warmup + schedule.num_runs):
                for outcome in group:
                    if outcome.failure is None:
                        with _ending(outcome):
                            _run(outcome, lines[outcome.variant.name], number, schedule)
    return outcomes


def _run(outcome: Outcome, line: Line, number: int, schedule: Schedule) -> None:
    """One run of one variant: the first that warms up is watched, the last one's frames are kept."""
    counted, name = number >= schedule.warmup, outcome.variant.name
    last = number + 1 == schedule.warmup + schedule.num_runs
    keep = outcome.keep if last else None
    line.send(Order(watch=number == 0 and not counted, keep=keep))
    trial: Trial = receive(line, outcome.variant)
    say(f"{f'run {number - schedule.warmup + 1}' if counted else 'warm-up'}: {name} {trial.seconds:.2f} s")
    if number == 0:
        outcome.watched = trial
    if counted:
        outcome.trials.append(trial)
    outcome.frames = keep


@contextmanager
def _ending(outcome: Outcome) -> Iterator[None]:
    """An error ends the variant, not the run."""
    try:
        yield
    except WanError as error:
        outcome.failure = error
        say(f"failed: {outcome.variant.name}: {error}")


def receive(line: Line, variant: Variant) -> Any:
    """What the worker says next. Raises its WanError, or GenerationFailed if it died."""
    try:
        answer = line.recv()
    except (EOFError, OSError) as error:
        raise GenerationFailed(f"the process of {variant.name!r} ended; its own words are above") from error
    if isinstance(answer, WanError):
        raise answer
    return answer


def say(text: str) -> None:
    print(text, file=sys.stderr)
