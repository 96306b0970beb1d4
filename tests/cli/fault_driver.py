"""Runs `generate.py`'s main in a process of its own for each line it reads, with the faults that line names.

Real signals need real processes, and starting Python with torch takes seconds: this one starts once, warms up, and
forks. A line is a JSON table: argv, cwd, env, out, err (files), faults (see faults.py). The answer is the exit status
as Python gives it: negative for a signal.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import faults  # noqa: E402 (beside this file)

from wan.cli.generate import main  # noqa: E402

GIVES_UP_AFTER_SECONDS = 240


def child(job: dict[str, Any]) -> NoReturn:
    """One run; never returns."""
    status = 1
    try:
        for number, path in enumerate((os.devnull, job["out"], job["err"])):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, number)
            os.close(opened)
        signal.alarm(GIVES_UP_AFTER_SECONDS)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        tempfile.tempdir = None  # asked for before the fork
        faults.inject(job["faults"])
        status = main(job["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def serve() -> None:
    import torch

    from wan.configs import WAN_CONFIGS

    torch.set_num_threads(1)
    WAN_CONFIGS["t2v-A14B"] = pickle.loads(Path(sys.argv[1]).read_bytes())
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("here"):  # at first, so that every child finds all modules imported
            answer = main(job["argv"])
            sys.stdout.flush()  # or a child would say it again
        else:
            pid = os.fork()
            if pid == 0:
                child(job)
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(1, f"status {answer}\n".encode())


if __name__ == "__main__":
    serve()
