"""`--mode quality`: every case makes the clips that the plain run makes, from the same noise, prompt by prompt.

Cases that need the networks loaded in one way share a process, so that a large checkpoint is read once for all of them.
What a clip came to is on the disk before the next one is made; a case that fails is a row that says why.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli.benchmarking import sheet, summary
from wan.cli.benchmarking.book import Book
from wan.cli.benchmarking.cases import PLAIN, Case
from wan.cli.benchmarking.processes import Line, OpenWorker, receive, say
from wan.cli.benchmarking.samples import Samples, measured
from wan.cli.benchmarking.trial import Order, Setting, Trial, Variant
from wan.engine.errors import GenerationFailed, OutputError, WanError
from wan.runs import write_whole

if TYPE_CHECKING:
    import torch

    from wan.engine.plan import Optimization


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is made: `words` are flags of generate.py for all, `asked` what each prompt says in their place.

    `shows` is what the demo's judge must read in each clip, where it can. `trained` frames are one clip of the model's.
    """

    words: tuple[str, ...]
    cases: Sequence[Case]
    asked: Sequence[Mapping[str, Any]]
    shows: Sequence[Mapping[str, str | None]] | None
    trained: int
    blocked: bool = False
    warmup: int = 1


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A process and the cases it serves; they share the networks."""

    variant: Variant
    cases: Sequence[Case]


def benches(survey: Survey, registry: Sequence[type[Optimization]]) -> list[Bench]:
    """The fewest processes that do; the plain run is in the first one."""
    from wan.engine.options import options_of

    fixed = {o.name for kind in registry if not kind.per_call for o in options_of(kind)}
    shared: dict[tuple[str, ...], list[Case]] = {}
    for case in survey.cases:
        loaded = Case(label="", values={name: value for name, value in case.values.items() if name in fixed})
        shared.setdefault(tuple(loaded.words(registry)), []).append(case)
    return [
        Bench(variant=Variant(name=" ".join(words) or "networks as they are", optimized=True, words=words), cases=cases)
        for words, cases in shared.items()
    ]


def conduct(survey: Survey, samples: Samples, pictures: Path, setting: Setting, start: OpenWorker) -> None:
    """Make every clip that `samples` lacks. Raises OutputError, or GenerationFailed for the plain run."""
    from wan.engine.optimizations import registry

    each = benches(survey, registry())
    with tempfile.TemporaryDirectory(prefix="quality_") as scratch:
        crew = _Crew(survey, samples, pictures, Path(scratch))
        for together in [[bench] for bench in each] if survey.blocked else [each]:
            busy = [bench for bench in together if any(crew.numbers(case) for case in bench.cases)]
            with ExitStack() as stack:
                for bench in busy:
                    say(f"loading {bench.variant.name} ...")
                    line = stack.enter_context(start(bench.variant, survey.words, setting))
                    crew.welcome(bench, line)
                crew.work(busy, keep_plain=survey.blocked)


class _Crew:
    """Processes at work on one survey."""

    def __init__(self, survey: Survey, samples: Samples, pictures: Path, scratch: Path) -> None:
        self.survey, self.samples, self.pictures, self.scratch = survey, samples, pictures, scratch
        self._lines: dict[str, Line] = {}
        self._plain: dict[int, Any] = {}
        """Latents of the plain clips; their frames are in files."""

    def numbers(self, case: Case) -> list[int]:
        """Of the prompts a case still has to make; the plain run makes what any other needs to be compared with."""
        cases = self.survey.cases if case.label == PLAIN else (case,)
        every = range(len(self.survey.asked))
        return [number for number in every if any(self.samples.missing(each.label, number) for each in cases)]

    def welcome(self, bench: Bench, line: Line) -> None:
        """Its networks are loaded, and it has made clips that do not count."""
        self._lines[bench.variant.name] = line
        try:
            receive(line, bench.variant)
            for _ in range(self.survey.warmup):
                line.send(Order(asked=self._asked(bench.cases[0], 0)))
                receive(line, bench.variant)
        except (WanError, OSError) as error:
            self._failed(bench.cases, error)

    def work(self, busy: Sequence[Bench], *, keep_plain: bool) -> None:
        """All clips of these processes, prompt by prompt."""
        todo = {case.label: set(self.numbers(case)) for bench in busy for case in bench.cases}
        for number in range(len(self.survey.asked)):
            for bench in busy:
                for case in bench.cases:
                    if number in todo[case.label] and case.label not in self.samples.failures:
                        self._make(bench, case, number)
            if not keep_plain:
                self._file(PLAIN, number).unlink(missing_ok=True)
            if any(number in numbers for numbers in todo.values()):
                say(f"prompt {number + 1} of {len(self.survey.asked)}")

    def _make(self, bench: Bench, case: Case, number: int) -> None:
        import numpy as np
        import torch

        line, keep = self._lines[bench.variant.name], self._file(case.label, number)
        try:
            line.send(Order(keep=keep, asked=self._asked(case, number)))
            trial: Trial = receive(line, bench.variant)
        except (WanError, OSError) as error:
            self._failed([case], error)
            return
        frames = torch.from_numpy(np.load(keep))
        if number == 0:
            self._show(case, frames)
        reference = None
        if case.label == PLAIN:
            self._plain[number] = trial.latents
        else:
            reference = torch.from_numpy(np.load(self._file(PLAIN, number))), self._plain[number]
            keep.unlink()
        shows = None if self.survey.shows is None else self.survey.shows[number]
        if self.samples.missing(case.label, number):
            self.samples.add(case.label, number, measured(trial, frames, reference, shows, self.survey.trained))

    def _asked(self, case: Case, number: int) -> dict[str, Any]:
        return {**self.survey.asked[number], **case.values}

    def _failed(self, cases: Sequence[Case], error: Exception) -> None:
        """A process that is gone fails with its next order too; so does each of its cases, in its own row."""
        for case in cases:
            if case.label == PLAIN:
                raise GenerationFailed(f"the plain run: {error}") from error
            say(f"failed: {case.label}: {error}")
            self.samples.fail(case.label, str(error) or type(error).__name__)

    def _file(self, label: str, number: int) -> Path:
        return self.scratch / f"{'plain' if label == PLAIN else 'other'}_{number}.npy"

    def _show(self, case: Case, frames: torch.Tensor) -> None:
        path = picture_of(self.pictures, self.survey.cases, case)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.strip(frames).save(path)
        except OSError as error:
            raise OutputError(f"--output_dir: {str(path)!r} cannot be written: {error.strerror}") from error


def picture_of(folder: Path, cases: Sequence[Case], case: Case) -> Path:
    """Where the frames of a case's first clip are kept until the sheet is made."""
    return folder / f"{[each.label for each in cases].index(case.label):02}.png"


def publish(book: Book, survey: Survey, samples: Samples, common: Mapping[str, Any]) -> list[str]:
    """Write the results and the sheet; what to say of them. Raises OutputError."""
    path, rows = book.path, summary.rows_of(survey.cases, samples, common)
    pictures = path.with_name(f"{path.stem}_pictures")
    strips = [(case.label, picture_of(pictures, survey.cases, case)) for case in survey.cases]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps({**book.head, "rows": rows}, indent=1, allow_nan=False) + "\n").encode())
        sheet.save_sheet(path.with_suffix(".png"), strips)
    except OSError as error:
        raise OutputError(f"--output_dir: {str(path)!r} cannot be written: {error.strerror}") from error
    return [*summary.markdown(rows), f"saved {path}", f"saved {path.with_suffix('.png')}"]
