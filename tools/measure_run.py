"""Runs a command, measures its wall time and peak memory (RAM and GPU) from outside, keeps the row in a Markdown table.

    python tools/measure_run.py --name test1 --table wok/README.md -- python generate.py ...

The row of the same name on the same device is replaced; the table lives between two comment lines of the file.
"""

from __future__ import annotations

import argparse
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

BEGIN, END = "<!-- results: made by tools/measure_run.py -->", "<!-- end of results -->"
HEADER = "| run | device | total s | GPU peak GiB | RAM peak GiB | command |\n|---|---|---|---|---|---|"


def nvidia_smi(query: str) -> str:
    """The first card's value of `query`, "" where there is no card."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class GpuPeak(threading.Thread):
    """Asks the driver for the used memory a few times a second, as the only view from outside the process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            self.mib = max(self.mib, float(nvidia_smi("memory.used") or 0))


def measure(command: list[str]) -> tuple[int, float, float, float]:
    """(exit code, seconds, GPU peak GiB, RAM peak GiB) of `command`."""
    watcher = GpuPeak()
    if nvidia_smi("name"):
        watcher.start()
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    elapsed = time.perf_counter() - start
    watcher.done.set()
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB elsewhere
    return code, elapsed, watcher.mib / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


def with_row(text: str, key: str, row: str) -> str:
    """`text` with `row` in its table in place of an earlier row that starts with `key`."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = [line for line in table.strip().splitlines()[2:] if not line.startswith(key)]
    return "\n".join([before + BEGIN, HEADER, *sorted([*rows, row]), END + after])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="the run's name in the table")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file with the two comment lines")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    args = parser.parse_args()
    code, seconds, gpu, ram = measure(args.command)
    if code:
        print(f"{args.name}: the command failed (exit code {code}); no row written", file=sys.stderr)
        return code
    device = nvidia_smi("name") or f"CPU ({platform.machine()})"
    key = f"| {args.name} | {device} |"
    gpu_text = f"{gpu:.1f}" if gpu else "-"
    row = f"{key} {seconds:.1f} | {gpu_text} | {ram:.1f} | `{shlex.join(args.command[1:])}` |"
    args.table.write_text(with_row(args.table.read_text(encoding="utf-8"), key, row), encoding="utf-8")
    print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
