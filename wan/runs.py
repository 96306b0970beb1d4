"""A generation's safety net on disk: its settings, the state of its denoise, and its latents before they are decoded.

All of it lives in one folder beside the video and goes when the video has been verified. Whatever ends the program,
`kill -9` included, leaves a folder that `--resume` continues from; every file in it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wan.engine.errors import BadRequest
from wan.engine.monitor import Silent
from wan.engine.types import Denoising, Progress

RECORD = "run.json"
STATE = "state.safetensors"
SLOW_SECONDS = 60.0
"""Where steps are slow, state is written after this time whatever the step."""
FORMAT = "1"


class Run:
    """The folder of one generation, and the `Keeper` the engine talks to.

    `record` is what the video was asked for (JSON), kept beside state and latents. State is written after every
    `every` steps (0: never), `keep_switch` also keeps the latents that one expert hands to the next. A disk that
    cannot take a file costs a note, not the video.
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
        self._due = False
        self._written = time.monotonic()
        self._held: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Make the folder and write the record. Raises OSError: at this point nothing is lost yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / RECORD, json.dumps(self.record, indent=1, ensure_ascii=False).encode())

    def latents_path(self, shot: int = 0) -> Path:
        """Where the finished latents of a shot are kept."""
        return self.folder / f"latents-{shot}.safetensors"

    def switch_path(self, shot: int = 0) -> Path:
        """Where the latents at the change of experts are kept."""
        return self.folder / f"switch-{shot}.safetensors"

    # What the engine asks -------------------------------------------------------------------------------------------

    def finished(self, shot: int) -> Tensor | None:
        path = self.latents_path(shot)
        return read_latents(path)[0] if path.is_file() else self._held.get(shot)

    def restore(self, run: Denoising) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        state = read_tensors(path)[0]
        if "latents" not in state or state["latents"].shape != run.latents.shape:
            shape = list(state["latents"].shape) if "latents" in state else "none"
            raise BadRequest(
                f"{str(path)!r} holds latents {shape}, this request needs {list(run.latents.shape)}: resume with the "
                "settings the run was started with"
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
        if self._due and resumable:
            self._due = False
            self._keep(self.folder / STATE, run.state())
            self._written = time.monotonic()

    def denoised(self, run: Denoising) -> None:
        if self._keep(self.latents_path(run.index), {"latents": run.latents}):
            (self.folder / STATE).unlink(missing_ok=True)
        else:
            self._held[run.index] = run.latents.cpu()  # better than nothing: an encoder that fails can be helped

    # -----------------------------------------------------------------------------------------------------------------

    def close(self, keep_latents: Path | None = None) -> None:
        """The video is safe: remove the folder, first moving the latents to `keep_latents` (and a name like it)."""
        if keep_latents is not None:
            for shot, path in enumerate(sorted(self.folder.glob("latents-*.safetensors"))):
                os.replace(path, _numbered(keep_latents, shot))
            for shot, path in enumerate(sorted(self.folder.glob("switch-*.safetensors"))):
                os.replace(path, _numbered(keep_latents.with_name(f"switch-{keep_latents.name}"), shot))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, path: Path, tensors: Mapping[str, Tensor]) -> bool:
        from safetensors import SafetensorError

        try:
            write_tensors(path, tensors, {"record": json.dumps(self.record, ensure_ascii=False)})
        except (OSError, SafetensorError) as error:
            self.progress.note(f"could not write {str(path)!r} ({error}); going on without it")
            return False
        return True


class Latents:
    """A `Keeper` that has finished latents already, so that a run only decodes them."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def finished(self, shot: int) -> Tensor | None:
        return self.latents

    def restore(self, run: Denoising) -> None: ...

    def stepped(self, run: Denoising, resumable: bool) -> None: ...

    def denoised(self, run: Denoising) -> None: ...


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file that appears under its name only when it is complete and on the disk."""
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, part, metadata={"format": FORMAT, **metadata})
        _replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears under its name only when it is complete and on the disk."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    _replace(part, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises BadRequest naming it when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadRequest(f"{str(path)!r} cannot be read as latents or state ({error})") from error


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Finished latents [1, C, T, H, W] and the record they were made by. Raises BadRequest."""
    tensors, metadata = read_tensors(path)
    latents = tensors.get("latents")
    if latents is None or latents.ndim != 5 or "generator" in tensors:
        held = ", ".join(tensors) or "nothing"
        raise BadRequest(f"{str(path)!r} does not hold finished latents (it holds {held}): pass a latents file")
    return latents, json.loads(metadata.get("record", "{}"))


def read_record(folder: Path) -> dict[str, Any]:
    """What the run in `folder` was asked for. Raises BadRequest where there is no run."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def _numbered(path: Path, shot: int) -> Path:
    return path if shot == 0 else path.with_name(f"{path.stem}-{shot}{path.suffix}")
