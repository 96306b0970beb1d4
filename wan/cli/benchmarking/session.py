"""One call of `benchmark_t2v.py`: everything is checked, then cell after cell is measured, told and written down."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wan.cli.benchmark import RIVALS
from wan.cli.benchmarking import told
from wan.cli.benchmarking.against import comparison
from wan.cli.benchmarking.book import FORMAT, Book, read_book
from wan.cli.benchmarking.matrix import BOTH, Cell, find_matrix, read_matrix
from wan.cli.benchmarking.noise import read_noise
from wan.cli.benchmarking.processes import OpenWorker, Schedule, measure, open_worker
from wan.cli.benchmarking.rows import rows_of
from wan.cli.benchmarking.trial import Setting, Variant
from wan.cli.benchmarking.upstream import check_upstream
from wan.engine.errors import BadRequest, GenerationFailed, IncompatibleOptions

if TYPE_CHECKING:
    from wan.cli.request import Wanted
    from wan.engine.options import Option

DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
DEFAULTS = {"num_runs": 3, "warmup": 1, "blocked": False}


def run(words: list[str], parser: argparse.ArgumentParser, start: OpenWorker = open_worker) -> int:
    """Measure, report, save, and check that what was compared did the same work. Raises WanError."""
    from wan.cli.request import fetch

    own, rest = parser.parse_known_args(words)
    book = None
    if own.resume is not None:
        book = read_book(own.resume, "--resume")
        words = [*_words_of(book, own.resume), *_without(words, "--resume")]
        own, rest = parser.parse_known_args(words)
    if own.mode == "quality":
        from wan.cli.benchmarking.asking import run_survey

        return run_survey(own, rest, words, book, start)
    cells, schedule = plan(own, rest)
    old = {name: read_book(Path(name), "--compare") for name in own.compare if name not in RIVALS}
    wanted = [check(cell, own) for cell in cells]
    for each in wanted:
        fetch(each)
    book = book or new_book(own, words, wanted[0].task)
    setting = Setting(threads=own.threads, noise=own.noise_file, upstream=own.upstream)
    for cell, each in zip(cells, wanted, strict=True):
        common = describe(each, cell, setting, schedule)
        if book.done(common["key"], len(cell.variants)):
            print(f"{cell.name or each.task}: done before")
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark_") as scratch:
            outcomes = measure(cell, setting, schedule, Path(scratch), start)
            rows = rows_of(outcomes, common, own.price_per_hour)
            print("\n".join(told.cell_lines(rows)))
            if _saves(own):
                book.add(rows, outcomes)
            else:
                book.rows += rows
    for name, before in old.items():
        print("\n".join(comparison(book.rows, before.rows, Path(name).name)))
    return _end(own, book)


def plan(own: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Cell], Schedule]:
    """What to measure and how often, by --matrix or else by --mode. Raises BadRequest or IncompatibleOptions."""
    from wan.cli.args import FLAGS, parse

    options = _options()
    given = parse(rest, options)
    if own.mode not in (("matrix", None) if own.matrix is not None else (None, "baseline", "optimized", "both")):
        said = f"--mode {own.mode}" + (f" --matrix {own.matrix}" if own.matrix else "")
        raise BadRequest(f"{said}: --matrix NAME|FILE goes with --mode matrix, and with no other")
    if own.matrix is None:
        cells, settings = [Cell(name="", words=tuple(rest), variants=variants(own))], dict[str, Any]()
    else:
        known = {flag.dest: False for flag in FLAGS} | {o.name: o.takes_bool for o in options}
        matrix = read_matrix(find_matrix(own.matrix), known)
        cells, settings = matrix.cells(rest, given, own.output_dir / "inputs"), dict(matrix.settings)
    extra = tuple(third_party(own))
    cells = [replace(cell, words=_with_defaults(cell), variants=_united(cell.variants, extra)) for cell in cells]
    return cells, _schedule(own, settings)


def _schedule(own: argparse.Namespace, settings: Mapping[str, Any]) -> Schedule:
    """What is spelled, else the matrix's `settings`, else the default; with the numbers checked."""
    for name, least in (("num_runs", 1), ("warmup", 0), ("threads", 1)):
        value = getattr(own, name)
        value = settings.get(name) if value is None else value
        if value is not None and value < least:
            raise BadRequest(f"--{name} {value}: it must be at least {least}")
    if own.price_per_hour is not None and not own.price_per_hour > 0:
        raise BadRequest(f"--price_per_hour {own.price_per_hour}: it must be greater than 0")
    spelled = {name: getattr(own, name) for name in DEFAULTS if getattr(own, name) is not None}
    return Schedule(**{name: spelled.get(name, settings.get(name, usual)) for name, usual in DEFAULTS.items()})


def variants(own: argparse.Namespace) -> tuple[Variant, ...]:
    """What --mode times. Beside diffusers the dtype is fixed: float32 like for like, bfloat16 as each can do best."""
    modes = tuple(variant for variant in BOTH if own.mode in (None, "both", variant.name))
    if not set(RIVALS) & set(own.compare):
        return modes
    alike = tuple(replace(variant, name=f"{variant.name} float32", dtype="float32") for variant in modes)
    return (*alike, Variant(name="optimized bfloat16", optimized=True, dtype="bfloat16"))


def third_party(own: argparse.Namespace) -> list[Variant]:
    """Other people's code, on the same weights and noise."""
    found = [
        Variant(name=f"{rival.replace('_', ' ')} {dtype}", runner=rival, dtype=dtype)
        for dtype in DTYPES
        for rival in RIVALS
        if rival in own.compare
    ]
    return found + ([Variant(name="upstream", runner="upstream")] if own.upstream is not None else [])


def check(cell: Cell, own: argparse.Namespace) -> Wanted:
    """What a cell makes, when every variant of it can be asked for. No weight is read. Raises WanError."""
    from wan.cli.args import parse
    from wan.cli.request import resolve

    options = _options()
    if own.noise_file is not None:
        read_noise(own.noise_file)
    for variant in cell.variants:
        wanted = resolve(parse([*cell.words, *variant.words], options))
        third = variant.runner.startswith("diffusers")
        if third and (wanted.load_format == "dummy" or wanted.solver != "unipc" or wanted.inputs is not None):
            given = {"dummy": "--load_format dummy"}.get(wanted.load_format, f"--sample_solver {wanted.solver}")
            given = f"--task {wanted.task}" if wanted.inputs is not None else given
            raise IncompatibleOptions(
                f"--compare {variant.runner} needs a text-to-video checkpoint folder and unipc, but {given} was given"
            )
        if variant.runner == "upstream":
            if own.upstream is None:
                raise BadRequest(f"variant {variant.name!r} runs the original code: name your clone with --upstream")
            check_upstream(own.upstream, wanted)
    return wanted


def describe(wanted: Wanted, cell: Cell, setting: Setting, schedule: Schedule) -> dict[str, Any]:
    """What all rows of a cell share. `key` tells the same work again, whatever the commit."""
    noise = f"seed {wanted.seed} on the CPU"
    if setting.noise is not None:
        noise = f"{setting.noise.name}, sha256 {hashlib.sha256(setting.noise.read_bytes()).hexdigest()[:16]}"
    done = {
        "cell": cell.name,
        **video_of(wanted),
        "noise": noise,
        "runs": schedule.num_runs,
        "warmup": schedule.warmup,
        "interleaved": not schedule.blocked,
        "threads": setting.threads or "default",
    }
    asked = json.dumps([done, cell.words, [asdict(variant) for variant in cell.variants]], default=str)
    key = hashlib.sha256(asked.encode()).hexdigest()[:16]
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**done, "key": key, "cpus": os.cpu_count(), "commit": commit(), "date": date}


def video_of(wanted: Wanted) -> dict[str, Any]:
    """The part of a row that says which video was made, by which weights."""
    return {
        "task": wanted.task,
        "weights": "dummy" if wanted.load_format == "dummy" else "checkpoint",
        "size": f"{wanted.width}x{wanted.height}",
        "frames": wanted.num_frames,
        "steps": wanted.steps,
        "solver": wanted.solver,
        "shift": wanted.shift,
        "guide_scale": wanted.guide_scale,
        "seed": wanted.seed,
    }


def commit() -> str:
    """The checkout's commit, marked when files differ from it; the version where there is no checkout."""
    import wan

    git = ["git", "-C", str(Path(wan.__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return f"version {wan.__version__}"
    return name.strip() + ("+changes" if changed else "")


def _end(own: argparse.Namespace, book: Book) -> int:
    """Paths, and the exit status: a matrix goes on past failed rows, but not one of them must be all there is."""
    if _saves(own) and book.rows:
        for path in book.files:
            print(f"saved {path}")
    told.check_agreement(book.rows)
    failed = [row for row in book.rows if row["status"] == "failed"]
    if failed and (own.matrix is None or len(failed) == len(book.rows)):
        raise GenerationFailed(f"{failed[0]['variant']}: {failed[0]['reason']}")
    return 0


def _saves(own: argparse.Namespace) -> bool:
    return bool(own.save_results or own.matrix is not None)


def new_book(own: argparse.Namespace, words: Sequence[str], name: str) -> Book:
    """An empty one; nothing is written yet."""
    name = name if own.matrix is None else Path(own.matrix).stem
    kind = "quality" if own.mode == "quality" else "benchmark"
    return Book(own.output_dir / f"{kind}_{name}_{time.strftime('%Y%m%d_%H%M%S')}.json", head_of(words))


def head_of(words: Sequence[str]) -> dict[str, Any]:
    """What a file of results says of itself; with its words `--resume` goes on."""
    import torch

    return {
        "format": FORMAT,
        "command": shlex.join(["python", "benchmark_t2v.py", *words]),
        "words": list(words),
        "commit": commit(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _words_of(book: Book, path: Path) -> list[str]:
    words = book.head.get("words")
    if not isinstance(words, list):
        raise BadRequest(f"--resume {str(path)!r} does not say which command made it; it is of an older version")
    return [str(word) for word in words]


def _without(words: Sequence[str], flag: str) -> list[str]:
    """`words` but `flag` and its value."""
    kept = list(words)
    for place, word in enumerate(words):
        if word.partition("=")[0] == flag:
            del kept[place : place + (1 if "=" in word else 2)]
    return kept


def _with_defaults(cell: Cell) -> tuple[str, ...]:
    """The demo model unless something else is named, and a seed, so that every run makes the same video."""
    from wan.cli.args import parse

    args = parse(cell.words, _options())
    nothing_named = args.task is None and args.ckpt_dir is None and args.dit is None
    task = ("--task=t2v-demo",) if nothing_named else ()
    return (*cell.words, *task, *(("--base_seed=42",) if args.base_seed is None else ()))


def _united(own: tuple[Variant, ...], extra: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """Without doubles: a matrix may have these of its own."""
    names = {variant.name for variant in own}
    return (*own, *(variant for variant in extra if variant.name not in names))


def _options() -> list[Option]:
    from wan.engine.optimizations import registry
    from wan.engine.plan import options

    return options(registry())
