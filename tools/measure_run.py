"""Runs a command line of generate.py and keeps a row about it in a Markdown table: what became of it, and its memory.

    python tools/measure_run.py --name test1 --table wok/README.md --vram_limit 12GB -- --task t2v-1.3B ...

Memory is computed from exactly these flags before the run, and measured while it runs, on a GPU. `--vram_limit` lets
torch refuse more, as a smaller card would; unlike generate.py's `--vram_budget` it changes no option. With or without a
GPU the order in which networks enter and leave the device is compared with what the flags promise; a CPU called cpu:0
is a device of its own for that. The row of the same name on the same device is replaced.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan.cli import env  # noqa: E402

if TYPE_CHECKING:
    from wan.cli.generate import Job
    from wan.cli.report import Terminal
    from wan.engine.prediction import Prediction

BEGIN, END = "<!-- results: made by tools/measure_run.py -->", "<!-- end of results -->"
HEADER = "| run | device | outcome | computed | measured | total s | command |\n|---|---|---|---|---|---|---|"
NOT_MEASURED = "not measured"
OTHER_ORDER = 1
"""Exit status of a run whose networks moved otherwise than its flags promise."""


class GpuPeak(threading.Thread):
    """Asks the driver for the used memory of the whole card several times a second; a context."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.hardware = job.hardware
        self.bytes = 0
        self._done = threading.Event()

    def run(self) -> None:
        import torch

        while not self._done.wait(0.1):
            free, total = torch.cuda.mem_get_info(self.hardware.device)
            self.bytes = max(self.bytes, total - free)

    def __enter__(self) -> GpuPeak:
        if self.hardware.is_cuda:
            self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()


class Moves(logging.Handler):
    """Collects what enters and leaves the device, as `wan.engine.placement` logs it; a context."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[str] = []
        self._logger = logging.getLogger("wan.engine.placement")

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())

    def __enter__(self) -> Moves:
        self._before = self._logger.level
        self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before)


def promised(values: Mapping[str, Any], experts: Sequence[str]) -> Iterator[str]:
    """The moves of one video from text with these options, in order."""
    for name in ("text_encoder", *experts, "vae"):
        if name == "text_encoder" and values["t5_cpu"]:
            continue
        yield f"{name} enters"
        if values["vae_cpu"] if name == "vae" else values["offload_model"]:
            yield f"{name} leaves"


def predicted(job: Job, limit: int | None) -> Prediction:
    """What the job needs with the options it has; no option is chosen."""
    from wan.cli.budget import models_for, video_of
    from wan.engine.prediction import predict
    from wan.engine.roofline import card_for, card_of

    here = job.hardware
    card = card_of(here.name, here.total_memory) if here.is_cuda else card_for(limit or 0)
    return predict(models_for(job.wanted, job.plan), video_of(job.wanted, job.plan), card, job.plan.values())


def outcome(job: Job, terminal: Terminal, moves: Moves) -> tuple[int, str]:
    """(exit status, what became of it) of making the video."""
    from wan.cli.generate import make
    from wan.cli.pipelines import memory_advice
    from wan.engine.attempts import is_out_of_memory
    from wan.engine.errors import GenerationFailed, WanError

    try:
        make(job, terminal)
    except WanError as error:
        terminal.failed(str(error))
        # What is kept, and how to go on, does not belong into a table.
        said = str(error).partition(";")[0]
        return error.exit_code, said if said.startswith("out of memory") else f"failed: {said}"
    except RuntimeError as error:  # while networks are constructed, before the program answers for them
        if not is_out_of_memory(error):
            raise
        said = f"out of memory: {memory_advice(job.plan)}"
        terminal.failed(said)
        return GenerationFailed.exit_code, said
    if job.wanted.inputs is None:
        wanted = list(promised(job.plan.values(), ("high", "low") if job.wanted.config.get("boundary") else ("dit",)))
        terminal.line(f"moves   {', '.join(moves.seen) or 'none'}")
        if moves.seen != wanted:
            terminal.failed(f"the flags promise other moves: {', '.join(wanted) or 'none'}")
            return OTHER_ORDER, "failed: networks moved in another order than the flags promise"
    return 0, "ok"


def checked(flags: Sequence[str], limit: int | None, claims: Any, terminal: Terminal) -> Job:
    """The job of a command line, with the limit in force. Raises WanError."""
    import torch

    from wan.cli.budget import Budget
    from wan.cli.extension import extended_and_named
    from wan.cli.generate import announce, check, read
    from wan.engine.budget import describe_budget, gigabytes
    from wan.engine.errors import BadRequest
    from wan.engine.optimizations import registry

    place = [] if torch.cuda.is_available() or "--device" in flags else ["--device", "cpu:0"]
    args = read([*flags, *place], terminal, variables=False)
    job = check(args, registry(), "none", claims)
    if limit is not None:
        if not job.hardware.is_cuda:
            raise BadRequest(f"--vram_limit {gigabytes(limit)}: there is no GPU here to limit; leave it out")
        Budget(size=limit, asked=True).enforce(job.hardware)
    announce(job, terminal)
    for line in describe_budget(predicted(job, limit)):
        terminal.line(line)
    return extended_and_named(args, job, claims, terminal)


def measured(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run, write the row, return the exit status. Raises WanError for a command line that cannot be run."""
    from wan.cli.naming import Claims
    from wan.cli.report import Notes
    from wan.cli.signals import stoppable
    from wan.engine.budget import gigabytes

    with stoppable(), Notes(terminal), Claims() as claims:
        job = checked(args.flags, args.vram_limit, claims, terminal)
        start = time.perf_counter()
        with Moves() as moves, GpuPeak(job) as peak:
            status, said = outcome(job, terminal, moves)
        seconds = time.perf_counter() - start
    expected = predicted(job, args.vram_limit)
    used = gigabytes(peak.bytes) if peak.bytes else NOT_MEASURED
    device = job.hardware.name + (f", limited to {gigabytes(args.vram_limit)}" if args.vram_limit else "")
    key = f"| {args.name} | {device} |"
    computed = f"{gigabytes(expected.peak_bytes)} ({expected.peak_phase})"
    command = shlex.join(["generate.py", *args.flags]).replace("|", "\\|")
    row = f"{key} {said} | {computed} | {used} | {seconds:.1f} | `{command}` |"
    args.table.write_text(with_row(args.table.read_text(encoding="utf-8"), key, row), encoding="utf-8")
    terminal.line(f"memory: {used}; computed {computed}")
    terminal.line(f"outcome: {said}")
    return status


def with_row(text: str, key: str, row: str) -> str:
    """`text` with `row` in its table in place of an earlier row that starts with `key`."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = [line for line in table.strip().splitlines()[2:] if not line.startswith(key)]
    return "\n".join([before + BEGIN, HEADER, *sorted([*rows, row]), END + after])


def main(argv: Sequence[str] | None = None) -> int:
    from wan.cli.args import memory
    from wan.cli.report import Terminal
    from wan.cli.signals import exit_status

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="the run's name in the table")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file with the two comment lines")
    parser.add_argument("--vram_limit", type=memory, help="emulate a smaller card: 12GB")
    parser.add_argument("flags", nargs="+", help="flags of generate.py, after --")
    args, terminal = parser.parse_args(argv), Terminal()
    return exit_status(lambda: measured(args, terminal), terminal)


if __name__ == "__main__":
    env.prepare()
    sys.exit(main())
