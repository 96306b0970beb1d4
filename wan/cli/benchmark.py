"""`benchmark_t2v.py`: times variants of one text-to-video run in turns and says what ran, on what, and how it was set.

Every variant has its own process and loads its networks before timing. A run is prompt to frames in memory. Warm-up
runs are not counted; the others are interleaved (A B A B), so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import env
from wan.cli.trial import Ready, Trial, Variant, serve
from wan.engine.errors import BadRequest, GenerationFailed, IncompatibleOptions, WanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wan.cli.request import Wanted

LATENTS_AGREE = 1e-3
"""Relative distance of final latents up to which two variants did the same work (float32, twenty steps of guidance)."""

COLUMNS = (
    "variant",
    "total s",
    "min",
    "max",
    "text s",
    "denoise s",
    "s/step",
    "decode s",
    "peak GiB",
    "latents differ",
)


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's own flags; all others are those of generate.py."""
    parser = argparse.ArgumentParser(
        prog="benchmark_t2v.py",
        description=__doc__,
        epilog="All flags of generate.py are understood too. Without --task and --ckpt_dir the demo model is timed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = "baseline: only the flags that say where networks live; optimized: all flags and --preset (default auto)"
    parser.add_argument("--mode", choices=("baseline", "optimized", "both"), default="both", help=modes)
    rival = "also time this library on the same weights, and check that its latents agree"
    parser.add_argument("--compare", choices=("diffusers",), help=rival)
    parser.add_argument("--num_runs", type=int, default=3, help="timed runs of each variant (default 3)")
    parser.add_argument("--warmup", type=int, default=1, help="runs before timing (default 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's)")
    blocked = "one variant after the other instead of in turns: for models that fit only once"
    parser.add_argument("--blocked", action="store_true", help=blocked)
    parser.add_argument("--save_results", action="store_true", help="write JSON and CSV and print their paths")
    parser.add_argument("--output_dir", type=Path, default=Path("results"), help="where to (default results/)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status."""
    env.prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(words)
    except WanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run(words: Sequence[str]) -> int:
    """Measure, report, save, and check that what was compared did the same work. Raises WanError."""
    from wan.cli.args import parse
    from wan.cli.request import fetch, resolve
    from wan.engine.optimizations import registry
    from wan.engine.plan import options

    own, rest = build_parser().parse_known_args(words)
    args = parse(rest, options(registry()))
    if args.task is None and args.ckpt_dir is None and args.dit is None:
        args.task = "t2v-demo"
    if args.base_seed is None:
        args.base_seed = 42
    if own.num_runs < 1 or own.warmup < 0:
        raise BadRequest(f"--num_runs {own.num_runs} --warmup {own.warmup}: at least one timed run is needed")
    wanted = resolve(args)
    if own.compare and (wanted.load_format == "dummy" or wanted.solver != "unipc"):
        given = "--load_format dummy" if wanted.load_format == "dummy" else f"--sample_solver {wanted.solver}"
        raise IncompatibleOptions(f"--compare {own.compare} needs a checkpoint folder and unipc, but {given} was given")
    fetch(wanted)
    common = describe(wanted, own, words)
    measured = measure(variants(own), args, own)
    rows = [row_of(variant, *measured[variant], measured, common) for variant in measured]
    print(
        f"{common['task']}, {common['size']}, {common['frames']} frames, {common['steps']} steps of {common['solver']}"
    )
    print(f"{rows[0]['hardware']}; commit {common['commit']}; median of {own.num_runs} runs")
    print("\n".join(markdown(rows)))
    print("\n".join(ratios(rows)))
    if own.save_results:
        for path in save(rows, own.output_dir):
            print(f"saved {path}")
    check_agreement(rows)
    return 0


def variants(own: argparse.Namespace) -> list[Variant]:
    """What to time. Comparing fixes the dtype: float32 like for like, bfloat16 as what each can do best."""
    modes = ("baseline", "optimized") if own.mode == "both" else (own.mode,)
    if own.compare is None:
        return [Variant(name=mode, optimized=mode == "optimized") for mode in modes]
    alike = [Variant(name=f"{mode} float32", optimized=mode == "optimized", dtype="float32") for mode in modes]
    return [
        *alike,
        Variant(name="diffusers float32", runner="diffusers", dtype="float32"),
        Variant(name="optimized bfloat16", optimized=True, dtype="bfloat16"),
        Variant(name="diffusers bfloat16", runner="diffusers", dtype="bfloat16"),
    ]


def measure(
    chosen: Sequence[Variant], args: argparse.Namespace, own: argparse.Namespace
) -> dict[Variant, tuple[Ready, list[Trial]]]:
    """Trials of every variant, warm-up excluded."""
    measured: dict[Variant, tuple[Ready, list[Trial]]] = {}
    for group in [[variant] for variant in chosen] if own.blocked else [list(chosen)]:
        with ExitStack() as stack:
            workers = {}
            for variant in group:
                print(f"loading {variant.name} ...", file=sys.stderr)
                workers[variant] = stack.enter_context(worker(variant, args, own.threads))
                measured[variant] = (receive(workers[variant], variant), [])
            for number in range(own.warmup + own.num_runs):
                for variant, connection in workers.items():
                    connection.send(True)
                    trial = receive(connection, variant)
                    counted = number >= own.warmup
                    label = f"run {number - own.warmup + 1}" if counted else "warm-up"
                    print(f"{label}: {variant.name} {trial.seconds:.2f} s", file=sys.stderr)
                    if counted:
                        measured[variant][1].append(trial)
    return measured


@contextmanager
def worker(variant: Variant, args: argparse.Namespace, threads: int | None) -> Iterator[Connection]:
    """A process that serves `variant`, ended on leaving."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, variant, args, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(False)
    finally:
        ours.close()
        process.join(timeout=30)
        process.kill()


def receive(connection: Connection, variant: Variant) -> Any:
    """What the worker says next. Raises its WanError, or GenerationFailed if it died."""
    try:
        answer = connection.recv()
    except EOFError as error:
        raise GenerationFailed(f"the process of {variant.name!r} ended; its own words are above") from error
    if isinstance(answer, WanError):
        raise answer
    return answer


def describe(wanted: Wanted, own: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """What all rows share."""
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
        "runs": own.num_runs,
        "warmup": own.warmup,
        "interleaved": not own.blocked,
        "threads": own.threads or "default",
        "cpus": os.cpu_count(),
        "commit": commit(),
        "command": shlex.join(["python", "benchmark_t2v.py", *words]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """The checkout's commit, marked when files differ from it; the version where there is no checkout."""
    import wan

    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return f"version {wan.__version__}"
    return name.strip() + ("+changes" if changed else "")


def row_of(
    variant: Variant,
    ready: Ready,
    trials: Sequence[Trial],
    measured: dict[Variant, tuple[Ready, list[Trial]]],
    common: dict[str, Any],
) -> dict[str, Any]:
    """One row of the report: medians, and how far the latents are from the first variant of the same dtype."""
    seconds = [trial.seconds for trial in trials]
    stages = {
        name: statistics.median(t.stages.get(name, 0.0) for t in trials) for name in ("text", "denoise", "decode")
    }
    first = next(other for other in measured if other.dtype == variant.dtype)
    return {
        "variant": variant.name,
        "runner": variant.runner,
        "dtype": variant.dtype or "as the task's",
        "total_s": statistics.median(seconds),
        "total_min_s": min(seconds),
        "total_max_s": max(seconds),
        **{f"{name}_s": value for name, value in stages.items()},
        "step_s": stages["denoise"] / common["steps"],
        "peak_gib": max(trial.peak_bytes for trial in trials) / 2**30,
        "reference": first.name,
        "latents_differ": None if first == variant else distance(trials[-1], measured[first][1][-1]),
        "plan": ready.plan,
        "hardware": ready.hardware,
        "versions": " ".join(f"{name} {version}" for name, version in ready.versions.items()),
        **common,
        "all_s": [round(value, 4) for value in seconds],
    }


def distance(trial: Trial, reference: Trial) -> float:
    """Relative L2 distance of final latents."""
    import numpy as np

    return float(np.linalg.norm(trial.latents - reference.latents) / np.linalg.norm(reference.latents))


def markdown(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The report as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        names = ("total_s", "total_min_s", "total_max_s", "text_s", "denoise_s", "step_s", "decode_s", "peak_gib")
        differ = "-" if row["latents_differ"] is None else f"{row['latents_differ']:.1e}"
        lines.append("| " + " | ".join([row["variant"], *(f"{row[name]:.3g}" for name in names), differ]) + " |")
    return lines


def ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Who is faster by how much, within each dtype, and best against best where two libraries ran."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        group = [row for row in rows if row["dtype"] == dtype]
        slowest = max(group, key=lambda row: row["total_s"])
        others = [row for row in group if row is not slowest]
        lines += [
            f"{r['variant']} is {slowest['total_s'] / r['total_s']:.2f}x as fast as {slowest['variant']}"
            for r in others
        ]
    best = {runner: min(r["total_s"] for r in rows if r["runner"] == runner) for runner in {r["runner"] for r in rows}}
    if len(best) == 2:
        lines.append(f"best dtype of each: {best['diffusers'] / best['wan']:.2f}x as fast as diffusers")
    return lines


def check_agreement(rows: Sequence[dict[str, Any]]) -> None:
    """Raise GenerationFailed if a float32 row that must do the same work as another one did not."""
    for row in rows:
        if row["runner"] == "diffusers" and row["dtype"] == "float32" and row["latents_differ"] > LATENTS_AGREE:
            raise GenerationFailed(
                f"latents of {row['variant']} differ by {row['latents_differ']:.1e} from {row['reference']} "
                f"(allowed {LATENTS_AGREE:g}): the times above compare different work"
            )


def save(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the rows as JSON and CSV and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"benchmark_{rows[0]['task']}_{time.strftime('%Y%m%d_%H%M%S')}"
    json_path, csv_path = stem.with_suffix(".json"), stem.with_suffix(".csv")
    json_path.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [json_path, csv_path]
