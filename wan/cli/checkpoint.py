"""Which task a checkpoint is for, and whether it is complete and fits. Reads names and headers, never a weight."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.resources import folder as data_folder

if TYPE_CHECKING:
    from wan.components import Checkpoint
    from wan.engine.types import Component
    from wan.layouts import CheckpointFiles

DEMO = "t2v-demo"
SHIPPED = {DEMO: "", "i2v-demo": "i2v"}
"""The tasks whose model travels with the package, and its place in the folder `demo`."""

# (model_type, width, experts) -> task. The rows of those that are shipped come from their configs.
_TASKS = {
    ("t2v", 1536, 1): "t2v-1.3B",
    ("t2v", 5120, 1): "t2v-14B",
    ("t2v", 5120, 2): "t2v-A14B",
    ("i2v", 5120, 1): "i2v-14B",
    ("i2v", 5120, 2): "i2v-A14B",
    ("flf2v", 5120, 1): "flf2v-14B",
    ("vace", 1536, 1): "vace-1.3B",
    ("vace", 5120, 1): "vace-14B",
    ("ti2v", 3072, 1): "ti2v-5B",
    ("s2v", 5120, 1): "s2v-14B",
    ("animate", 5120, 1): "animate-14B",
}

_REPOSITORIES = {
    "t2v-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "t2v-14B": "Wan-AI/Wan2.1-T2V-14B",
    "t2i-14B": "Wan-AI/Wan2.1-T2V-14B",
    "t2v-A14B": "Wan-AI/Wan2.2-T2V-A14B",
    "i2v-14B": "Wan-AI/Wan2.1-I2V-14B-720P",
    "flf2v-14B": "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "i2v-A14B": "Wan-AI/Wan2.2-I2V-A14B",
    "ti2v-5B": "Wan-AI/Wan2.2-TI2V-5B",
    "vace-1.3B": "Wan-AI/Wan2.1-VACE-1.3B",
    "vace-14B": "Wan-AI/Wan2.1-VACE-14B",
    "s2v-14B": "Wan-AI/Wan2.2-S2V-14B",
    "animate-14B": "Wan-AI/Wan2.2-Animate-14B",
}


def detect_task(folder: Path | None, configs: dict[str, Any], files: CheckpointFiles | None = None) -> str | None:
    """The task of a checkpoint, by its transformers' keys and shapes, else by config.json; None if nothing tells.

    Sizes nobody has published (a tiny test model) count as the first task of their kind with as many experts. Raises
    BadRequest where a folder holds several models.
    """
    tasks = held_tasks(folder, configs, files)
    if len(tasks) > 1:
        named = ", ".join(f"{each.name} ({each.told_by.name})" for each in tasks)
        raise BadRequest(f"--ckpt_dir {str(folder)!r} holds several models: {named}; choose with --task")
    return tasks[0].name if tasks else None


@dataclass(frozen=True, kw_only=True)
class HeldTask:
    """A task a checkpoint can serve; `exact` if its sizes are the published ones, so that no other task has them."""

    name: str
    exact: bool
    told_by: Path

    def serves(self, task: str) -> bool:
        if self.exact:
            return self.name == task.replace("t2i-", "t2v-")
        return self.name.partition("-")[0] in ("t2v", task.partition("-")[0])


def held_tasks(folder: Path | None, configs: dict[str, Any], files: CheckpointFiles | None = None) -> list[HeldTask]:
    """The task of every model that is there."""
    from wan.layouts.held import held

    known = dict(_TASKS)
    known |= {(_kind(task), configs[task].dim, 2): task for task in SHIPPED if task in configs}
    tasks = []
    for each in held(folder, files):
        kind, dim = each.model.kind, each.model.dim
        name = known.get((kind, dim, each.experts))
        other = _like(kind, each.experts, configs) or f"{kind} of width {dim}"
        tasks.append(HeldTask(name=name or other, exact=name is not None, told_by=each.told_by))
    return tasks


def _like(kind: str, experts: int, configs: dict[str, Any]) -> str | None:
    """The first task of that kind with as many experts; those that are shipped have sizes of their own."""
    from wan.layouts import experts_of

    tasks = (task for task in configs if task.partition("-")[0] == kind and task not in SHIPPED)
    return next((task for task in tasks if len(experts_of(configs[task])) == experts), None)


def shipped_folder(task: str) -> Path:
    """The model of a task in `SHIPPED`. Raises BadCheckpoint where it was left out."""
    try:
        folder = data_folder("demo") / SHIPPED[task]
    except FileNotFoundError as error:
        raise BadCheckpoint(f"the demo model is not installed ({error}); pass its folder with --ckpt_dir") from error
    if not folder.is_dir():
        raise BadCheckpoint(f"the model of {task} is not installed: there is no {str(folder)!r}; pass --ckpt_dir")
    return folder


def check_folder(folder: Path | None, task: str, configs: dict[str, Any], files: CheckpointFiles | None = None) -> None:
    """Raise BadCheckpoint unless `folder` and `files` can serve `task`: all is there and every key and shape fits.

    Reads headers, no weight. Names all that is missing and how to get it.
    """
    from wan.components import Checkpoint

    if folder is not None:
        _check_is_folder(folder)
    lacking = missing_files(folder, task, configs, files)
    if not lacking:
        check_kind(folder, folder, task, configs, files)
        Checkpoint(folder, configs[task], files, _kind(task)).check()
        return
    for held in held_tasks(folder, configs, files):
        if held.name != task and held.name in configs and not missing_files(folder, held.name, configs, files):
            raise _other(folder, held.name, task, configs, files)
    said = "the files named" if folder is None else f"--ckpt_dir {str(folder)!r}"
    verb = "lack" if folder is None else "lacks"
    raise BadCheckpoint(f"{said} {verb} what {task} needs: {', '.join(lacking)}. {_get(task)}")


def components_of(task: str, folder: Path | None, files: CheckpointFiles | None = None) -> list[Component]:
    """The networks of a checkpoint for `task`, checked; without folder and files those of its real sizes, with random
    weights. Reads headers, no weight. Raises BadCheckpoint.
    """
    from wan.components import dummy_components
    from wan.configs import WAN_CONFIGS

    if folder is None and files is None:
        return dummy_components(WAN_CONFIGS[task])
    return checkpoint_of(task, folder, files).components()


def checkpoint_of(task: str, folder: Path | None, files: CheckpointFiles | None = None) -> Checkpoint:
    """The checkpoint that `task` reads there; nothing is looked at yet."""
    from wan.components import Checkpoint
    from wan.configs import WAN_CONFIGS

    config = WAN_CONFIGS[task]
    return Checkpoint(folder, config, files, config.get("model_type", _kind(task)))


def check_kind(
    source: str | Path | None,
    folder: Path | None,
    task: str,
    configs: dict[str, Any],
    files: CheckpointFiles | None = None,
) -> None:
    """Raise BadCheckpoint when `source`, a folder or repository with its files in `folder`, is for other tasks."""
    held = held_tasks(folder, configs, files)
    if held and not any(each.serves(task) for each in held):
        raise _other(source, held[0].name, task, configs, files)


def _other(
    source: str | Path | None, held: str, task: str, configs: dict[str, Any], files: CheckpointFiles | None
) -> BadCheckpoint:
    said = "--dit" if source is None else f"--ckpt_dir {str(source)!r}"
    widening = [] if files is None else files.widening()
    said += "".join(f" with --{flag} {str(path)!r}" for flag, path in widening)
    cure = f"pass --task {held} or another checkpoint" if held in configs else "pass another checkpoint"
    return BadCheckpoint(f"{said} holds {held}, not {task}: {cure}{' or LoRA' if widening else ''}")


def missing_files(
    folder: Path | None, task: str, configs: dict[str, Any], files: CheckpointFiles | None = None
) -> list[str]:
    """What `task` expects and is not there: paths relative to `folder`, or the flag that names a file."""
    from wan.layouts import locate

    return [*locate(folder, configs[task], files, _kind(task)).lacking(), *_missing_speech(folder, configs[task])]


def _missing_speech(folder: Path | None, config: Any) -> list[str]:
    """What is not there of the speech model, where a task has one; it lies in the folder alone."""
    from wan.modules.s2v.audio_encoder import missing

    if "wav2vec" not in config:
        return []
    if folder is None:
        return [f"{config.wav2vec} (--ckpt_dir)"]
    return [f"{config.wav2vec}/{name}" for name in missing(folder / config.wav2vec)]


def _kind(task: str) -> str:
    """What its transformers are called by `wan.layouts.models`."""
    return task.partition("-")[0].replace("t2i", "t2v")


def no_folder(task: str | None) -> BadRequest:
    """The error of a command line without --ckpt_dir."""
    what = f"the {task} checkpoint" if task else "a Wan checkpoint"
    how = _get(task or "t2v-A14B")
    demo = f"Or try --task {DEMO}, which needs no download."
    return BadRequest(f"--ckpt_dir is missing: pass the folder of {what}. {how} {demo}")


def _check_is_folder(folder: Path) -> None:
    if folder.is_file():
        raise BadCheckpoint(
            f"--ckpt_dir {str(folder)!r} is a file; name it with --dit, and what goes with it with --t5, --vae and "
            "--tokenizer"
        )
    if not folder.is_dir():
        raise BadCheckpoint(f"--ckpt_dir {str(folder)!r} is not a folder{_similar(folder)}")


def _get(task: str) -> str:
    repository = _REPOSITORIES.get(task)
    return f"Get it: hf download {repository} --local-dir FOLDER." if repository else ""


def _similar(folder: Path) -> str:
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f"; did you mean {str(folder.parent / close[0])!r}?" if close else ""
