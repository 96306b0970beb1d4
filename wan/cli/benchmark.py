"""`benchmark_t2v.py`: times variants of one run, or a matrix of them, and says what ran, on what, and how it was set.

Every variant has its own process and loads its networks before timing. A run is prompt to frames in memory. Warm-up
runs are not counted; the others are interleaved (A B A B), so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from wan.cli import env
from wan.cli.report import Terminal
from wan.cli.signals import exit_status, stoppable
from wan.engine.errors import BadRequest

RIVALS: tuple[Literal["diffusers", "diffusers_compiled"], ...] = ("diffusers", "diffusers_compiled")


class Parser(argparse.ArgumentParser):
    """Raises BadRequest instead of printing a page of usage and leaving the process."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise BadRequest(message.removeprefix("argument "))


def build_parser() -> Parser:
    """The benchmark's own flags; all others are those of generate.py."""
    parser = Parser(
        prog="benchmark_t2v.py",
        description=__doc__,
        epilog="All flags of generate.py are understood too. Without --task and --ckpt_dir the demo model is timed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = (
        "baseline: only the flags that say where networks live; optimized: all flags and --preset (default auto); "
        "matrix: what --matrix says; quality: what every optimisation that is not bitwise gains and loses"
    )
    known = ("baseline", "optimized", "both", "matrix", "quality")
    parser.add_argument("--mode", choices=known, help=f"{modes} (default both)")
    cases = (
        "of --mode quality: optimisations, options, sets of --quality, or rounding, lossy; or one group for long videos"
    )
    parser.add_argument("--cases", metavar="NAME,NAME", help=f"{cases} (default all but the groups)")
    prompts = "of --mode quality: clips of each row (default 400 of the demo model, the lines of --prompt_file, or 16)"
    parser.add_argument("--num_prompts", type=int, metavar="N", help=prompts)
    matrix = "tasks, sizes, lengths and options to go through: a name in configs/benchmarks, or FILE.toml"
    parser.add_argument("--matrix", metavar="NAME|FILE", help=matrix)
    against = (
        "diffusers, diffusers_compiled: also time this library on the same weights, and check that its latents agree; "
        "RESULTS.json: tell what has become faster or slower since. May be given several times"
    )
    parser.add_argument("--compare", action="append", default=[], metavar="WITH", help=against)
    clone = "folder of your clone of Wan's own code: run it too, and tell how far each of its stages is from ours"
    parser.add_argument("--upstream", type=Path, metavar="DIR", help=clone)
    noise = "latents [C, T, H, W] to begin with (.safetensors, .npy, .pt) instead of noise of the seed"
    parser.add_argument("--noise_file", type=Path, metavar="FILE", help=noise)
    price = "what the machine costs in an hour: adds the price of a video"
    parser.add_argument("--price_per_hour", type=float, metavar="PRICE", help=price)
    parser.add_argument("--num_runs", type=int, help="timed runs of each variant (default 3)")
    parser.add_argument("--warmup", type=int, help="runs before timing (default 1); the first is looked into")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's)")
    blocked = "one variant after the other instead of in turns: for models that fit only once"
    parser.add_argument("--blocked", action="store_true", default=None, help=blocked)
    saved = "write JSON, CSV and an HTML report and print their paths; a matrix always does"
    parser.add_argument("--save_results", action="store_true", help=saved)
    parser.add_argument("--output_dir", type=Path, default=Path("results"), help="where to (default results/)")
    resume = "go on with an interrupted benchmark, by its command line; flags given beside it are added"
    parser.add_argument("--resume", type=Path, metavar="RESULTS.json", help=resume)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status."""
    env.prepare()
    words = list(sys.argv[1:] if argv is None else argv)

    def act() -> int:
        from wan.cli.benchmarking.session import run

        with stoppable():
            return run(words, build_parser())

    return exit_status(act, Terminal())
