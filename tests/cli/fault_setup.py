"""What the fault tests stand on: the process that runs `generate.py` for them, broken encoders, damaged files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("fault_driver.py")
SMALL = ["--size", "32x32", "--any_size", "--sample_steps", "8", "--device", "cpu", "--crf", "0"]
FRAME_BYTES = 32 * 32 * 3


@dataclass(frozen=True)
class Result:
    """How a run ended. `status` is negative for a signal."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Driver:
    """Runs command lines of the tiny model in processes of their own."""

    def __init__(self, checkpoint: Path, config: dict[str, Any], folder: Path) -> None:
        self.checkpoint = checkpoint
        described = folder / "config.pickle"
        described.write_bytes(pickle.dumps(config))
        environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        with (folder / "driver.err").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(DRIVER), str(described)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=environment,
            )  # fmt: skip
        assert self.here([*self.argv(), "--save_file", str(folder / "warm.mp4")]) == 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self, name: str) -> int:
        """A number that Linux knows of the driver, such as VmRSS in KiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def here(self, argv: Sequence[str]) -> int:
        """The exit status of `generate.py` with `argv` in the driver itself, as in a service."""
        return self._ask({"here": True, "argv": list(argv)})

    def argv(
        self, *, video: bool = True, checkpoint: Path | None = None, bird: str = "red", seed: int = 1
    ) -> list[str]:
        task = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint or self.checkpoint)]
        what = ["--prompt", f"a {bird} bird", "--seed", str(seed)]
        return [*task, *SMALL, *what, "--frame_num", "5" if video else "1", "--state_every", "2"]

    def run(self, argv: Sequence[str], cwd: Path, faults: Sequence[str] = (), **env: str) -> Result:
        """What `generate.py` with `argv` in `cwd` does when `faults` strike it."""
        out, err = cwd.with_name(f"{cwd.name}.out"), cwd.with_name(f"{cwd.name}.err")
        out.write_text("")
        err.write_text("")
        job = {
            "argv": list(argv),
            "cwd": str(cwd),
            "env": env,
            "out": str(out),
            "err": str(err),
            "faults": list(faults),
        }
        return Result(self._ask(job), out.read_text(), err.read_text())

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # main prints the path of a video
            if line.startswith("status "):
                return int(line.split()[1])
        raise AssertionError("the driver has died")


# Encoders ------------------------------------------------------------------------------------------------------------

_FAILS = "echo 'Conversion failed!' >&2; exit 1"
_AFTER_TRIAL = {
    "dies": _FAILS,
    "dies later": f"head -c {FRAME_BYTES} > /dev/null; {_FAILS}",
    "killed": f"head -c {FRAME_BYTES} > /dev/null; kill -9 $$",
    "garbage": 'cat > /dev/null; for part; do :; done; echo garbage > "${part#file:}"; exit 0',
    "drops": f'(head -c {2 * FRAME_BYTES}; cat > /dev/null) | "$ffmpeg" "$@"; exit 0',
    "unreadable": 'touch "$0.fails"',
    "vanishes": "",
}


def ffmpeg(kind: str, folder: Path) -> Path:
    """An encoder that is fine in the trial and fails afterwards, or "missing", or "broken" from the start."""
    import imageio_ffmpeg

    path = folder / "ffmpeg"
    if kind == "missing":
        return path
    lines = ["#!/bin/sh", f"ffmpeg='{imageio_ffmpeg.get_ffmpeg_exe()}'"]
    if kind == "broken":
        lines += [_FAILS]
    else:
        lines += ['case "$*" in *rawvideo*) echo >> "$0.calls"', 'if [ $(wc -l < "$0.calls") -gt 1 ]; then']
        lines += [_AFTER_TRIAL[kind] or ":", "fi;; esac"]
        lines += [
            'if [ -e "$0.fails" ]; then case "$*" in *progress*) echo "moov atom not found" >&2; exit 1;; esac; fi'
        ]
        gone = 'case "$*" in *progress*) "$ffmpeg" "$@"; status=$?; rm "$0"; exit $status;; esac'
        lines += [gone] if kind == "vanishes" else []
        lines += ['exec "$ffmpeg" "$@"']
    path.write_text("\n".join(lines) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# Files ---------------------------------------------------------------------------------------------------------------


def linked(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint folder whose files may be damaged."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return folder


def damage(path: Path, how: str) -> None:
    """`path` is "truncated", "flipped" (a bit of its last value), "removed", or full of "nan"."""
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "flipped":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif how == "nan":
        from safetensors.torch import load, save

        path.write_bytes(save({name: tensor * float("nan") for name, tensor in load(content).items()}))
    else:
        assert how == "removed"


def frames(path: Path) -> str:
    """What is seen in an image, a video or a folder of frames, as a hash."""
    import imageio_ffmpeg
    from PIL import Image

    if path.suffix == ".mp4":
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "pipe:1"]
        return hashlib.sha256(subprocess.run(command, capture_output=True, check=True).stdout).hexdigest()
    with Image.open(path) as image:
        return hashlib.sha256(image.tobytes()).hexdigest()


def listing(folder: Path) -> set[str]:
    """Every file below `folder`."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def processes_in(folder: Path) -> list[str]:
    """The command lines that name `folder`, where the system tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found
