"""Which task a checkpoint folder is for, and whether it is complete. Reads names and config.json, never a weight."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.resources import folder as data_folder

DEMO = "t2v-demo"

# (model_type, width, experts) -> task. The demo model's row comes from its config.
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
}

_REPOSITORIES = {
    "t2v-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "t2v-14B": "Wan-AI/Wan2.1-T2V-14B",
    "t2i-14B": "Wan-AI/Wan2.1-T2V-14B",
    "t2v-A14B": "Wan-AI/Wan2.2-T2V-A14B",
}


def detect_task(folder: Path, configs: dict[str, Any]) -> str | None:
    """The task `folder` holds, by the config.json of its transformer; None where there is none to read.

    Sizes nobody has published (a tiny test model) count as the text-to-video task with as many experts.
    """
    two = folder / "high_noise_model" / "config.json"
    path = two if two.is_file() else folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind, dim = str(fields.get("model_type", "t2v")), fields.get("dim")
    except (OSError, ValueError, AttributeError):
        return None
    if fields.get("_class_name") == "VaceWanModel":
        kind = "vace"
    experts = 2 if path is two else 1
    tasks = dict(_TASKS)
    if DEMO in configs:
        tasks["t2v", configs[DEMO].dim, 2] = DEMO
    if kind != "t2v":
        return tasks.get((kind, dim, experts), f"{kind} of width {dim}")
    return tasks.get((kind, dim, experts), "t2v-A14B" if experts == 2 else "t2v-14B")


def demo_folder() -> Path:
    """The model that travels with the package. Raises BadCheckpoint where it was left out."""
    try:
        return data_folder("demo")
    except FileNotFoundError as error:
        raise BadCheckpoint(f"the demo model is not installed ({error}); pass its folder with --ckpt_dir") from error


def check_folder(folder: Path, task: str, configs: dict[str, Any]) -> None:
    """Raise BadCheckpoint, naming all that is missing and how to get it, unless `folder` can serve `task`."""
    if not folder.is_dir():
        raise BadCheckpoint(f"--ckpt_dir {str(folder)!r} is not a folder{_similar(folder)}")
    said = f"--ckpt_dir {str(folder)!r}"
    lacking = missing_files(folder, configs[task])
    held = detect_task(folder, configs)
    if not lacking:
        check_kind(str(folder), held, task)
        return
    if (folder / "model_index.json").is_file():
        raise BadCheckpoint(f"{said} is in diffusers' layout; this version reads the original one. {_get(task)}")
    if held is not None and held != task and held in configs and not missing_files(folder, configs[held]):
        raise _other(str(folder), held, task)
    raise BadCheckpoint(f"{said} lacks what {task} needs: {', '.join(lacking)}. {_get(task)}")


def check_kind(source: str, held: str | None, task: str) -> None:
    """Raise BadCheckpoint when `source`, a folder or repository, holds (`held`) another kind of task than `task`."""
    if held is not None and held.partition("-")[0] not in ("t2v", task.partition("-")[0]):
        raise _other(source, held, task)


def _other(source: str, held: str, task: str) -> BadCheckpoint:
    return BadCheckpoint(f"--ckpt_dir {source!r} holds {held}, not {task}: pass --task {held} or another checkpoint")


def missing_files(folder: Path, config: Any) -> list[str]:
    """What the config expects and `folder` lacks, as paths relative to it."""
    from wan.components import Checkpoint

    wanted = Checkpoint(folder, config)
    paths = [wanted.text_encoder, wanted.tokenizer, wanted.vae]
    lacking = [path for path in paths if not path.exists()]
    for expert in wanted.experts.values():
        lacking += [path for path in (expert / "config.json",) if not path.is_file()]
        lacking += _missing_weights(expert)
    return [str(path.relative_to(folder)) for path in lacking]


def no_folder(task: str | None) -> BadRequest:
    """The error of a command line without --ckpt_dir."""
    what = f"the {task} checkpoint" if task else "a Wan checkpoint"
    how = _get(task or "t2v-A14B")
    demo = f"Or try --task {DEMO}, which needs no download."
    return BadRequest(f"--ckpt_dir is missing: pass the folder of {what}. {how} {demo}")


def _missing_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BadCheckpoint(f"{str(index)!r} cannot be read ({error!r}); download it again") from error
        return [folder / shard for shard in shards if not (folder / shard).is_file()]
    single = folder / f"{stem}.safetensors"
    return [] if single.is_file() or any(folder.glob(f"{stem}*.safetensors")) else [single]


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
