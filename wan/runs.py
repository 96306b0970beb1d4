"""A generation's safety net on disk: its settings, the state of its denoise, and its latents before they are decoded.

All of it lives in one folder beside the video and goes when the video has been verified. Whatever ends the program,
`kill -9` included, leaves a folder that `--resume` continues from; every file in it appears whole or not at all.
One process at a time works in a folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.engine.monitor import Silent
from wan.engine.types import Denoising, Progress

RECORD = "run.json"
STATE = "state.safetensors"
LOCK = "lock"
SLOW_SECONDS = 60.0
"""Where steps are slow, state is written after this time whatever the step."""
FORMAT = "1"
_BEGIN_AGAIN = "if a run's folder holds it, remove it there and --resume begins again"


class Run:
    """The folder of one generation, and the `Keeper` the engine talks to.

    `record` is what the video was asked for (JSON), kept beside state and latents. State is written after every
    `every` steps (0: never) and by `interrupted`, `keep_switch` also keeps the latents that one expert hands to the
    next. A disk that cannot take a file costs a note, not the video.
    """

    def __init__(
        self,
        folder: Path,
        record: Mapping[str, Any],
        *,
        every: int = 5,
        keep_switch: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.record = dict(record)
        self.every = every
        self.keep_switch = keep_switch
        self.progress: Progress = progress or Silent()
        self._lock = Lock(self.folder / LOCK)
        self._due = False
        self._written = time.monotonic()
        self._last: dict[str, Tensor] | None = None
        self._held: dict[int, Tensor] = {}
        self._refuge: Path | None = None

    def begin(self) -> None:
        """Make the folder, take it for this process and write the record. Nothing is lost yet when this fails.

        Raises OSError, and BadRequest where another process works in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        write_whole(self.folder / RECORD, json.dumps(self.record, indent=1, ensure_ascii=False).encode())

    def latents_path(self, shot: int = 0) -> Path:
        """Where the finished latents of a shot are kept."""
        return self.folder / f"latents-{shot}.safetensors"

    def switch_path(self, shot: int = 0) -> Path:
        """Where the latents at the change of experts are kept."""
        return self.folder / f"switch-{shot}.safetensors"

    def safe_latents(self) -> Path | None:
        """Where the latents of the first shot are: in the folder, or where else there was room. None if nowhere."""
        places = (self.latents_path(), self._refuge)
        return next((path for path in places if path is not None and path.is_file()), None)

    # What the engine asks -------------------------------------------------------------------------------------------

    def finished(self, shot: int) -> Tensor | None:
        path = self.latents_path(shot)
        return read_latents(path)[0] if path.is_file() else self._held.get(shot)

    def restore(self, run: Denoising) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        state = read_tensors(path)[0]
        if not {"latents", "done", "index", "generator"} <= state.keys():
            raise BadRequest(f"{str(path)!r} holds no state of a run; {_BEGIN_AGAIN}")
        if state["latents"].shape != run.latents.shape:
            raise BadRequest(
                f"{str(path)!r} holds latents {list(state['latents'].shape)}, this request needs "
                f"{list(run.latents.shape)}: resume with the settings the run was started with"
            )
        if state["generator"].shape != run.generator.get_state().shape:
            raise BadRequest(
                f"{str(path)!r} was written on another device than {run.latents.device.type!r}: continue on the "
                "one the run was started on (--device)"
            )
        if int(state["index"]) == run.index:
            run.load(state)
            self.progress.note(f"continuing after step {run.done} of {len(run.steps)}")

    def stepped(self, run: Denoising, resumable: bool) -> None:
        if self.keep_switch and 0 < run.done < len(run.steps):
            before, after = run.steps[run.done - 1], run.steps[run.done]
            if before.expert != after.expert:
                self._keep(self.switch_path(run.index), {"latents": run.latents})
        if self.every > 0 and run.done < len(run.steps):
            self._due |= run.done % self.every == 0 or time.monotonic() - self._written > SLOW_SECONDS
            self._last = run.state() if resumable else self._last
        if self._due and resumable:
            self._due = False
            self._keep_state()

    def denoised(self, run: Denoising) -> None:
        if self._keep(self.latents_path(run.index), {"latents": run.latents}):
            self._last = None
            (self.folder / STATE).unlink(missing_ok=True)
            return
        self._held[run.index] = run.latents.cpu()
        if run.index == 0:  # on another disk there may be room: an encoder that fails as well can then be helped
            refuge = Path(tempfile.gettempdir()) / f"{self.folder.stem}-{os.getpid()}.latents.safetensors"
            self._refuge = refuge if self._keep(refuge, {"latents": run.latents}) else None

    # -----------------------------------------------------------------------------------------------------------------

    def interrupted(self) -> bool:
        """Write the state of the last step and let other processes have the folder. True if more than the record is
        kept."""
        if self._last is not None:
            self._keep_state()
        self.release()
        return holds_work(self.folder) or self.safe_latents() is not None

    def close(self, keep_latents: Path | None = None) -> None:
        """The video is safe: remove the folder, first moving the latents to `keep_latents` (and a name like it).

        Raises OSError where they cannot be moved: then they stay.
        """
        if keep_latents is not None:
            for path in self.folder.glob("latents-*.safetensors"):
                os.replace(path, _numbered(keep_latents, int(path.stem.rpartition("-")[2])))
            for path in self.folder.glob("switch-*.safetensors"):
                shot = int(path.stem.rpartition("-")[2])
                os.replace(path, _numbered(keep_latents.with_name(f"switch-{keep_latents.name}"), shot))
            if self._refuge is not None:
                shutil.move(self._refuge, keep_latents)
        if self._refuge is not None:
            self._refuge.unlink(missing_ok=True)
        if sys.platform == "win32":  # where an open file cannot be removed
            self.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another process work in the folder."""
        self._lock.release()

    def _keep_state(self) -> None:
        state = self._last
        # On a GPU broken latents are noticed one step late: what holds them is nothing to go on from.
        if state is not None and bool(torch.isfinite(state["latents"]).all()):
            self._keep(self.folder / STATE, state)
        self._last = None  # only now: Ctrl-C may come while it is written
        self._written = time.monotonic()

    def _keep(self, path: Path, tensors: Mapping[str, Tensor]) -> bool:
        from safetensors import SafetensorError

        try:
            write_tensors(path, tensors, {"record": json.dumps(self.record, ensure_ascii=False)})
        except (OSError, SafetensorError) as error:
            self.progress.note(f"could not write {str(path)!r} ({error}); going on without it")
            return False
        return True


class Lock:
    """A file that one process holds. The system lets go of it when the process ends, so that none is ever stale."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> None:
        """Raises BadRequest naming the process that has it. A disk that knows no locks is trusted."""
        if self._file is not None:
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                holder = os.read(file, 32).decode("ascii", "replace").strip()
                os.close(file)
                raise BadRequest(
                    f"another process ({holder or 'unknown'}) is at work in {str(self.path.parent)!r}: wait for it or "
                    "stop it, or choose another --save_file"
                ) from error
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """The file stays: removing it would let two processes hold two files of one name."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _lock(file: int) -> None:
    """Raises OSError at once where another process holds the lock."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 1 << 20, os.SEEK_SET)  # beyond what is read: Windows keeps others from reading what is locked
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Latents:
    """A `Keeper` that has finished latents of the first shots already, so that a run only decodes them."""

    def __init__(self, *latents: Tensor) -> None:
        self.latents = latents

    @classmethod
    def kept(cls, path: Path) -> Latents:
        """Those in the file that `Run.close` made, and in the files of later shots beside it. Raises BadRequest."""
        found, shot = [read_latents(path)[0]], 1
        while _numbered(path, shot).is_file():
            found.append(read_latents(_numbered(path, shot))[0])
            shot += 1
        return cls(*found)

    def finished(self, shot: int) -> Tensor | None:
        return self.latents[shot] if shot < len(self.latents) else None

    def restore(self, run: Denoising) -> None: ...

    def stepped(self, run: Denoising, resumable: bool) -> None: ...

    def denoised(self, run: Denoising) -> None: ...


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file that appears under its name only when it is complete and on the disk."""
    from safetensors.torch import save

    # Copies: what a solver remembers after its first step is the latents themselves, and a file may not share memory.
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    # Through our own file: the library's are readable by their owner alone.
    write_whole(path, save(held, metadata={"format": FORMAT, "crc32": _checksum(held), **metadata}))


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears under its name only when it is complete and on the disk."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        _replace(part, path)
    except BaseException:
        _remove(part)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises BadRequest naming it when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise BadRequest(f"{str(path)!r} cannot be read as latents or state ({error}); {_BEGIN_AGAIN}") from error
    if metadata.get("crc32", _checksum(tensors)) != _checksum(tensors):
        raise BadRequest(f"{str(path)!r} is damaged: its checksum is another; {_BEGIN_AGAIN}")
    return tensors, metadata


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Finished latents [1, C, T, H, W] and the record they were made by. Raises BadRequest."""
    tensors, metadata = read_tensors(path)
    latents = tensors.get("latents")
    if latents is None or latents.ndim != 5 or "generator" in tensors:
        held = ", ".join(tensors) or "nothing"
        raise BadRequest(f"{str(path)!r} does not hold finished latents (it holds {held}): pass a latents file")
    if not bool(torch.isfinite(latents).all()):
        raise BadRequest(f"{str(path)!r} holds NaN or infinity: nothing can be decoded from it, make the video again")
    try:
        return latents, dict(json.loads(metadata.get("record", "{}")))
    except (ValueError, TypeError) as error:
        raise BadRequest(f"{str(path)!r}: the record in it is damaged ({error}); pass another file") from error


def holds_work(folder: Path) -> bool:
    """True where a folder keeps more of a run than its record."""
    return any(Path(folder).glob("*.safetensors"))


def read_record(folder: Path) -> dict[str, Any]:
    """What the run in `folder` was asked for. Raises BadRequest where there is no run."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        for kept in sorted(Path(folder).glob("*.safetensors")):  # each has the record inside
            with contextlib.suppress(BadRequest, ValueError, KeyError):
                return dict(json.loads(read_tensors(kept)[1]["record"]))
        raise BadRequest(
            f"--resume {str(folder)!r}: no run was left there ({RECORD} cannot be read: {error})"
        ) from error
    if not isinstance(record, dict):
        raise BadRequest(f"--resume {str(folder)!r}: {RECORD} holds a {type(record).__name__}, not the record of a run")
    return record


def _replace(part: Path, path: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values; disks and cables do flip bits, and nobody sees one in a video that is hours away."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _remove(part: Path) -> None:
    """Remove what was not completed; that it cannot be is no news where it could not be written."""
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)


def _numbered(path: Path, shot: int) -> Path:
    return path if shot == 0 else path.with_name(f"{path.stem}-{shot}{path.suffix}")
