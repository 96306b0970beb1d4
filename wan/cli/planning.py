"""A queue as it stands before anything is loaded: every job checked, and told apart from what was made before.

A job is known by a hash of all its settings, so that the same command finds again what it has finished, what it has
begun and what has failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import record
from wan.cli.budget import in_step
from wan.cli.checkpoint import checkpoint_of
from wan.cli.extension import asked_for
from wan.cli.generate import Job, Shared, examine, machine, names_file, recorded
from wan.cli.naming import Claims, run_folder
from wan.cli.prompts import Entry, read_entries
from wan.cli.recall import SOURCES, recall, refuse_to_replace
from wan.cli.request import fetch, find_source
from wan.cli.results import DONE, Results, default_path
from wan.engine.errors import BadRequest, WanError
from wan.engine.given_loras import LORA_FLAGS
from wan.runs import holds_work, read_record

if TYPE_CHECKING:
    from wan.engine.plan import Optimization


@dataclass(frozen=True, kw_only=True)
class Item:
    """A job of the queue. Its output has a name only once it begins, unless `resume` is the folder of its run.

    `made` is the file of a job that was finished before.
    """

    index: int
    entry: Entry
    job: Job
    key: str
    made: Path | None = None
    resume: Path | None = None

    @property
    def cost(self) -> int:
        """What its time is taken to be in proportion to."""
        wanted = self.job.wanted
        return wanted.steps * wanted.num_frames * wanted.width * wanted.height


@dataclass(frozen=True, kw_only=True)
class Queue:
    """All jobs, where their results go, and the first job's seed where it was drawn."""

    items: list[Item]
    results: Results
    batch: int
    drawn_seed: int | None = None
    notes: tuple[str, ...] = ()


def plan_queue(args: argparse.Namespace, registry: Sequence[type[Optimization]], default_preset: str) -> Queue:
    """The queue of a command line with --prompt_file. Raises WanError for the first thing that cannot be done."""
    _refuse(args)
    path = Path(args.prompt_file).expanduser()
    entries = read_entries(path, args, registry)
    keep_beside(entries)
    results = _results(args, path)
    seed, drawn = _first_seed(args, results)
    for index, entry in enumerate(entries):
        if entry.seed is None or entry.seed < 0:
            entry.args.base_seed = seed + index
    shared = Shared(source=find_source(args), hardware=machine(args, registry))
    jobs = in_step([_examined(entry, registry, default_preset, shared) for entry in entries], registry)
    _refuse_one_file_twice(entries)
    items = [
        Item(index=index, entry=entry, job=job, key=_key(job, entry))
        for index, (entry, job) in enumerate(zip(entries, jobs, strict=True))
    ]
    if not args.print_plan and jobs[0].wanted.repository is not None:
        fetch(jobs[0].wanted)
        items = [dataclasses.replace(item, job=recorded(item.entry.args, item.job)) for item in items]
    _check_weights(items, there=not args.print_plan or jobs[0].wanted.repository is None)
    batch, notes = _batch(args, jobs[0])
    return Queue(
        items=list(_compared(items, results)), results=results, batch=batch, drawn_seed=seed if drawn else None,
        notes=(*notes, *dict.fromkeys(note for job in jobs for note in job.notes)),
    )  # fmt: skip


def weights_of(made: dict[str, Any]) -> str:
    """One hash of all weights in a record."""
    return _hash({part: entry.get("hash") for part, entry in made.get("weights", {}).items()})


# Checks --------------------------------------------------------------------------------------------------------------


def _refuse(args: argparse.Namespace) -> None:
    for name in ("prompt", *SOURCES):
        if getattr(args, name) is not None:
            flag = f"--{name.rstrip('_')}"
            raise BadRequest(f"{flag} and --prompt_file each say what to make: give one of them")
    if args.expert_batch is not None and args.expert_batch < 1:
        raise BadRequest(f"--expert_batch {args.expert_batch}: give a number of videos, at least 1")


def _results(args: argparse.Namespace, path: Path) -> Results:
    place = default_path(path) if args.results is None else Path(args.results).expanduser()
    if place.is_dir() or str(args.results) == "":
        raise BadRequest(f"--results {args.results!r} is a folder; give it a file name")
    if place.absolute() == path.absolute():
        raise BadRequest(f"--results {str(place)!r} is the --prompt_file: give it another name")
    return Results(place)


def _first_seed(args: argparse.Namespace, results: Results) -> tuple[int, bool]:
    """Seed of the first job, and whether it is drawn. A queue that is started again keeps the one drawn then."""
    if args.base_seed is not None and args.base_seed >= 0:
        return int(args.base_seed), False
    known = results.drawn_seed()
    return random.randint(0, sys.maxsize) if known is None else known, True


def keep_beside(entries: Sequence[Entry]) -> None:
    """Keep LoRAs beside the weights, which are loaded once, where jobs have different ones and nothing else is said."""
    chosen = {tuple(getattr(entry.args, name) or () for name in LORA_FLAGS) for entry in entries}
    for entry in entries:
        if len(chosen) > 1 and entry.args.lora_mode in (None, "auto"):
            entry.args.lora_mode = "onthefly"


def _examined(entry: Entry, registry: Sequence[type[Optimization]], default_preset: str, shared: Shared) -> Job:
    """The job of a line. Its name is one that it could have: it gets its own when it begins."""
    try:
        with Claims() as trial:
            care = recall(entry.args).care
            job = examine(entry.args, registry, default_preset, trial, care=care, shared=shared)
            return recorded(entry.args, job)
    except WanError as error:
        raise entry.refused(error) from error


def _check_weights(items: Sequence[Item], *, there: bool) -> None:
    """Refuse a line whose LoRAs do not fit the model, which is loaded once, for the first one."""
    from wan.pipeline import check_weights

    first, checked = items[0].job, [items[0].job.plan]
    if not there or first.wanted.load_format == "dummy":
        return
    checkpoint = checkpoint_of(first.wanted.task, first.wanted.checkpoint, first.wanted.files)
    for item in items:
        if item.job.plan not in checked:
            try:
                check_weights(checkpoint, item.job.plan)
            except WanError as error:
                raise item.entry.refused(error) from error
            checked.append(item.job.plan)


def _refuse_one_file_twice(entries: Sequence[Entry]) -> None:
    taken: dict[Path, int] = {}
    for entry in entries:
        if not names_file(entry.args):
            continue
        path = Path(entry.args.save_file).expanduser().absolute()
        if path in taken:
            clash = f"--save_file {entry.args.save_file!r} is the file of line {taken[path]} too"
            raise entry.refused(BadRequest(f"{clash}: give each line its own, or all a folder, --save_file FOLDER/"))
        taken[path] = entry.line


def _batch(args: argparse.Namespace, job: Job) -> tuple[int, tuple[str, ...]]:
    """How many videos are made together, with a note where that would gain nothing."""
    batch = args.expert_batch or 1
    if batch > 1 and job.wanted.config.get("boundary") is None:
        return 1, (f"--expert_batch {batch}: {job.wanted.task} has one expert, so videos are made one by one",)
    return batch, ()


# What was made before ------------------------------------------------------------------------------------------------


def _key(job: Job, entry: Entry) -> str:
    """Hash of all that makes the video, and of the name its file has to have."""
    inputs = {name: each.get("hash") for name, each in job.record.get("inputs", {}).items()}
    file = str(Path(entry.args.save_file).expanduser().absolute()) if names_file(entry.args) else None
    extend = {} if job.extend is None else {"extend": job.extend.settings}
    return _hash({"flags": job.record["flags"], "inputs": inputs, "file": file, **extend})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _compared(items: Sequence[Item], results: Results) -> Iterator[Item]:
    """`items`, each with its file or its interrupted run where there is one. Raises BadRequest for a run in the way."""
    for item, row in zip(items, results.before([item.key for item in items]), strict=True):
        path = Path(row["path"]) if row is not None and row.get("path") else None
        if path is None and names_file(item.entry.args):
            path = item.job.output.path
        if path is not None and _is_made(item, path, row):
            yield dataclasses.replace(item, made=path)
            continue
        resume = None if path is None else _own_run(item, run_folder(path))
        if resume is None:
            try:
                refuse_to_replace(item.job.output.path, item.job.care)
            except WanError as error:
                raise item.entry.refused(error) from error
        yield dataclasses.replace(item, resume=resume)


def _is_made(item: Item, path: Path, row: dict[str, Any] | None) -> bool:
    """Whether `path` is this job's video: by its row, or by the record in it if the row is not about its end."""
    if row is None or not path.is_file() or run_folder(path).is_dir():
        return False
    if row["status"] == DONE:
        return bool(row.get("weights") == weights_of(item.job.record))
    try:
        inside = record.read(path)
    except BadRequest:
        return False
    return _same(inside, item)


def _own_run(item: Item, folder: Path) -> Path | None:
    """`folder`, if a run of this very job was left there."""
    if not folder.is_dir():
        return None
    try:
        return folder if _same(read_record(folder), item) else None
    except BadRequest:
        return None if holds_work(folder) else folder


def _same(made: dict[str, Any], item: Item) -> bool:
    same = asked_for(made) == asked_for(item.job.record, item.job.extend)
    return same and weights_of(made) == weights_of(item.job.record)
