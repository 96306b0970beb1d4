"""Many videos from one command: models are loaded once, a job that fails stops no other, and what was made is not made
again when the command is repeated.

Jobs go to the engine in groups, so that each of two experts is brought in once for a group; a group of one is the plain
case. Each video is saved, and its line of results written, as soon as its last frame is decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import traceback
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import memory, pipelines
from wan.cli.extension import carried_on, extended
from wan.cli.generate import names_file, output_path, save, tell_plan, whole
from wan.cli.planning import Item, Queue, plan_queue, weights_of
from wan.cli.production import Production
from wan.cli.report import Terminal, clock_time, end_lines, start_lines
from wan.cli.results import DONE, FAILED, INTERRUPTED, STARTED
from wan.engine.errors import IncompatibleOptions, WanError

if TYPE_CHECKING:
    from wan.cli.generate import Job
    from wan.cli.naming import Claims
    from wan.engine.plan import Optimization

UNEXPECTED = 4
"""Exit status of an error nobody has foreseen, as of one while generating."""


def run_queue(
    args: argparse.Namespace,
    registry: Sequence[type[Optimization]],
    default_preset: str,
    claims: Claims,
    terminal: Terminal,
) -> int:
    """Make the videos of --prompt_file and return their worst exit status. Raises WanError before the first begins."""
    queue = plan_queue(args, registry, default_preset)
    if not args.print_plan:
        queue.results.begin()
    for line in announcement(queue):
        terminal.line(line)
    if args.print_plan:
        tell_plan(queue.items[0].job, terminal)
        return 0
    queue = worded(queue, terminal)
    runner = Runner(queue, claims, terminal)
    for group in groups(queue):
        runner.make(group)
    terminal.line(runner.summary())
    return runner.worst


def announcement(queue: Queue) -> list[str]:
    """What will be made, by the example of the first job."""
    first = queue.items[0].job
    lines = start_lines(first.wanted, first.plan, first.hardware, first.preset)
    made = sum(item.made is not None for item in queue.items)
    again = f", {made} of them made before" if made else ""
    seeds = "" if queue.drawn_seed is None else f"; seeds from {queue.drawn_seed} on (drawn)"
    lines += [] if first.extend is None else [f"extend  {first.extend}"]
    lines.append(f"queue   {len(queue.items)} videos{again}{seeds}; results in {queue.results.path}")
    return lines + [f"note: {note}" for note in queue.notes]


def worded(queue: Queue, terminal: Terminal) -> Queue:
    """The queue with its prompts extended where that is asked for; a run that goes on keeps the one it has."""
    items = [
        item if item.resume is None else dataclasses.replace(item, job=carried_on(item.job, item.resume))
        for item in queue.items
    ]
    waiting = [item for item in items if item.made is None]
    jobs = dict(zip((item.index for item in waiting), extended([item.job for item in waiting], terminal), strict=True))
    items = [dataclasses.replace(item, job=jobs.get(item.index, item.job)) for item in items]
    return dataclasses.replace(queue, items=items)


def groups(queue: Queue) -> Iterator[list[Item]]:
    """The jobs still to be made, in their order, at most `queue.batch` at a time and all of a group run alike."""
    waiting = [item for item in queue.items if item.made is None]
    for _, alike in groupby(waiting, key=lambda item: item.job.plan):
        items = list(alike)
        for start in range(0, len(items), queue.batch):
            yield items[start : start + queue.batch]


class JobTerminal(Terminal):
    """The progress of one video of a queue. Its stages end where another video's begin, so its times are its own."""

    def __init__(self, queue: Terminal, turn: list[JobTerminal]) -> None:
        super().__init__(queue.stream, queue.clock)
        self._turn = turn
        """Whose stage is running: one at most, shared by all videos of the queue."""

    def stage(self, name: str, detail: str = "") -> None:
        for other in self._turn:
            if other is not self:
                other.end_stage()
                other.end_line()
        self._turn[:] = [self]
        super().stage(name, detail)


class Runner:
    """Makes groups of jobs, and keeps count. The pipeline is built for the first job that is not finished yet."""

    def __init__(self, queue: Queue, claims: Claims, terminal: Terminal) -> None:
        self.queue = queue
        self.claims = claims
        self.terminal = terminal
        self.worst = 0
        self._failed: list[int] = []
        self._pipeline: Any = None
        self._turn: list[JobTerminal] = []
        self._done = {item.index for item in queue.items if item.made is not None}
        self._before = len(self._done)
        self._pace: tuple[float, int] = (0.0, 0)
        """Seconds spent on groups that are over, and what those cost."""

    def make(self, items: Sequence[Item]) -> None:
        """Make a group. Only what ends the program is raised."""
        since = self.terminal.clock()
        if self._pipeline is None:
            self._pipeline = pipelines.build(items[0].job, self.terminal)
        if pipelines.streams(self._pipeline):
            self._together(items)
        else:
            self._one_by_one(items)
        seconds, cost = self._pace
        self._pace = (seconds + self.terminal.clock() - since, cost + sum(item.cost for item in items))

    def summary(self) -> str:
        """The last line."""
        made = len(self._done) - self._before
        parts = [f"{made} made", f"{self._before} made before" if self._before else ""]
        if self._failed:
            parts.append(f"{len(self._failed)} failed (video {', '.join(str(index + 1) for index in self._failed)})")
        return f"queue   {', '.join(filter(None, parts))}; results in {self.queue.results.path}"

    # -----------------------------------------------------------------------------------------------------------------

    def _together(self, items: Sequence[Item]) -> None:
        """Through the engine's groups. A video is finished within its group, a failure is told of after it."""
        from wan.pipeline import Group

        group = Group()
        begun: list[_Begun] = []
        try:
            for item in items:
                one = _Begun(item, item.job, JobTerminal(self.terminal, self._turn))
                begun.append(one)
                if not self._join(one, group):
                    begun.remove(one)
            failures = self._pipeline.run_group(group)
        except BaseException as error:
            for one in begun:
                if one.item.index not in self._done:
                    self._end(one, error, INTERRUPTED)
            raise
        for one, failure in zip(begun, failures, strict=True):
            if failure is not None:
                self._end(one, failure, FAILED)

    def _join(self, one: _Begun, group: Any) -> bool:
        """Let a job join the group; False for one that fails before its turn."""
        try:
            one.job = self._begin(one.item)
            one.production = Production(one.job, one.terminal)
            self._pipeline.progress = one.terminal
            extras = one.production.extras(self._pipeline)
            pipelines.call(self._pipeline, one.job, group=group, done=lambda: self._finish(one), **extras)
        except Exception as error:  # of this job alone: the next one may do better
            self._end(one, error, FAILED)
            return False
        return True

    def _finish(self, one: _Begun) -> None:
        """All frames of a video are decoded."""
        assert one.production is not None
        path = one.production.finish(self._pipeline)
        for line in end_lines(self._pipeline.report, memory.peak_bytes(one.job.hardware.device), one.job.hardware):
            self.terminal.line(line)
        self._succeeded(one, path)

    def _one_by_one(self, items: Sequence[Item]) -> None:
        """With a class or a writer that is not ours, which makes tensors."""
        for item in items:
            own = JobTerminal(self.terminal, self._turn)
            one = _Begun(item, item.job, own)
            try:
                if item.job.plan != self.queue.items[0].job.plan:
                    name = type(self._pipeline).__name__
                    raise IncompatibleOptions(f"{name} cannot change options from job to job: leave them out")
                one.job = self._begin(item)
                own.stage("generate")
                video = whole(self._pipeline, one.job, own)
                own.stage("save")
                save(one.job, video)
                own.end_stage()
            except Exception as error:  # of this job alone: the next one may do better
                self._end(one, error, FAILED)
            except BaseException as error:
                self._end(one, error, INTERRUPTED)
                raise
            else:
                self._succeeded(one, one.job.output.path)

    # -----------------------------------------------------------------------------------------------------------------

    def _begin(self, item: Item) -> Job:
        """The job with the name of its file, which is now taken. Says that it begins."""
        job = item.job
        if item.resume is not None and not names_file(item.entry.args):
            path = item.resume.with_name(item.resume.name.removesuffix(".run"))
        else:
            path = output_path(item.entry.args, job.wanted, self.claims)
        made = {**job.record, "created": datetime.now().astimezone().isoformat(timespec="seconds")}
        made["output"] = {**job.record["output"], "path": os.path.abspath(path)}
        job = dataclasses.replace(
            job, output=dataclasses.replace(job.output, path=path), record=made,
            care=dataclasses.replace(job.care, resume=item.resume),
        )  # fmt: skip
        on = ", continued" if item.resume is not None else ""
        self.terminal.line(f"video   {item.index + 1} of {len(self.queue.items)}{self._eta()}{on}: {_told(job)}")
        self._add(item, job, STARTED)
        return job

    def _eta(self) -> str:
        seconds, cost = self._pace
        if not cost:
            return ""
        left = sum(item.cost for item in self.queue.items if item.index not in {*self._done, *self._failed})
        return f", ETA {clock_time(seconds / cost * left)}"

    def _succeeded(self, one: _Begun, path: Path) -> None:
        self._done.add(one.item.index)
        self._add(one.item, one.job, DONE, seconds=one.terminal.spent())
        self.terminal.line(f"times   {one.terminal.times()}")
        self.terminal.line(f"saved   {path}")
        print(path, flush=True)

    def _end(self, one: _Begun, error: BaseException, status: str) -> None:
        """A job has not become a video: what can be kept of it is."""
        if one.production is not None and one.production.saved:  # but for a signal that waited until it had
            self._succeeded(one, one.production.path)
            return
        if one.production is not None:
            self._pipeline.progress = one.terminal
            error = one.production.failed(self._pipeline, error)
        one.terminal.end_stage()
        one.terminal.end_line()
        text = " ".join(str(error).split()) or type(error).__name__
        if status == FAILED:
            code = error.exit_code if isinstance(error, WanError) else UNEXPECTED
            self.worst = max(self.worst, code)
            self._failed.append(one.item.index)
            if not isinstance(error, WanError):
                text = f"{type(error).__name__}: {text}"
                self.terminal.line("".join(traceback.format_exception(error)).rstrip())
            self.terminal.line(f"failed  {one.item.index + 1} of {len(self.queue.items)}: {text}")
        self._add(one.item, one.job, status, error=text, seconds=one.terminal.spent())

    def _add(self, item: Item, job: Job, status: str, *, error: str = "", seconds: float | None = None) -> None:
        """A line of results. That it cannot be written is no reason to stop making videos."""
        wanted = job.wanted
        row: dict[str, Any] = {
            "index": item.index, "line": item.entry.line, "prompt": wanted.prompt, "seed": wanted.seed,
            "path": os.path.abspath(job.output.path), "status": status, "error": error or None,
            "seconds": None if seconds is None else round(seconds, 3),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"), "key": item.key,
            "weights": weights_of(job.record),
        }  # fmt: skip
        if self.queue.drawn_seed is not None:
            row["drawn_seed"] = self.queue.drawn_seed
        try:
            self.queue.results.add(row)
        except OSError as problem:
            self.terminal.note(f"no line could be added to --results {str(self.queue.results.path)!r} ({problem})")


@dataclasses.dataclass
class _Begun:
    """A job under way; `production` is None where a class that is not ours makes the video."""

    item: Item
    job: Job
    terminal: JobTerminal
    production: Production | None = None


def _told(job: Job) -> str:
    wanted = job.wanted
    frames = "one image" if wanted.num_frames == 1 else f"{wanted.num_frames} frames"
    prompt = wanted.prompt if len(wanted.prompt) <= 60 else f"{wanted.prompt[:57]}..."
    return f"{prompt!r}, {wanted.width}x{wanted.height}, {frames}, {wanted.steps} steps, seed {wanted.seed}"
