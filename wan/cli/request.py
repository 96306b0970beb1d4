"""From the namespace to what to make: task, checkpoint, size, frames, seed and sampling, each with the reason for it.

Precedence: the program's default, the task's config, the flag. Everything is checked here, before a weight is read.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wan.cli import hub
from wan.cli.checkpoint import DEMO, SHIPPED, check_folder, check_kind, detect_task, no_folder, shipped_folder
from wan.cli.inputs import Asked, Inputs, read_inputs
from wan.conditioning.geometry import check_frames, check_video, frames_for, multiples, nearest_size, parse_size
from wan.engine.errors import BadRequest
from wan.engine.given_loras import LORA_FLAGS, parsed
from wan.layouts import CheckpointFiles

DEFAULT_TASK = "t2v-A14B"
DEFAULT_SIZE = "1280*720"

EXAMPLE_PROMPTS = {
    "t2v": "A red fox trots through fresh snow at dawn, its breath steaming, while the camera glides along beside it.",
    "i2v": "The picture comes to life: everything in it moves gently and naturally while the camera holds still.",
    "flf2v": "A smooth, natural motion leads from the first picture to the last in one continuous shot.",
    "vace": "A red fox trots through fresh snow at dawn, its breath steaming, while the camera glides along beside it.",
    "s2v": "A person looks into the camera and speaks, calm and lively, with natural movements of head and hands.",
    "t2i": "A lighthouse on a basalt cliff under a clearing storm, warm light in its windows, painted in oils.",
    DEMO: "a big yellow triangle moves to the right on a gray dotted background",
    "i2v-demo": "it moves slowly to the right",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to make, resolved. `why` says for a field where its value comes from; `size_name` is `W*H`."""

    task: str
    config: Any
    checkpoint: Path | None
    prompt: str
    n_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    steps: int
    shift: float
    solver: str
    guide_scale: float | tuple[float, float]
    seed: int
    noise_device: str | None = None
    load_format: str = "auto"
    repository: hub.Repository | None = None
    files: CheckpointFiles | None = None
    inputs: Inputs | None = None
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What `generate` gets beside the prompt and the sampling, by upstream's names."""
        if self.inputs is not None:
            return self.inputs.arguments
        return {"size": (self.width, self.height), "frame_num": self.num_frames}

    @property
    def size_name(self) -> str:
        return f"{self.width}*{self.height}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The part of a request that says which weights make it: the same for all jobs of a queue."""

    task: str
    checkpoint: Path | None
    repository: hub.Repository | None
    why: Mapping[str, str]


def find_source(args: argparse.Namespace) -> Source:
    """What `resolve` finds out about task and checkpoint. Raises BadRequest or BadCheckpoint."""
    from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS

    why: dict[str, str] = {}
    repository = hub.named(args.ckpt_dir, offline=bool(args.offline))
    task = _task(args, repository, WAN_CONFIGS, SUPPORTED_SIZES, why)
    checkpoint = _checkpoint(args, repository, task, WAN_CONFIGS)
    return Source(task=task, checkpoint=checkpoint, repository=repository, why=why)


def resolve(args: argparse.Namespace, source: Source | None = None, *, inputs: bool = True) -> Wanted:
    """What the command line asks for. Raises BadRequest or BadCheckpoint; loads nothing but configs.

    Of a Hugging Face repository it looks at no more than that: `fetch` brings the rest once everything else is checked.
    A `source` that is known is not looked for again. Without `inputs` the task's pictures and sounds are not asked for.
    """
    from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS

    why: dict[str, str] = {}
    if source is None:
        repository = hub.named(args.ckpt_dir, offline=bool(args.offline))
        task = _task(args, repository, WAN_CONFIGS, SUPPORTED_SIZES, why)
    else:
        repository, task, why["task"] = source.repository, source.task, source.why["task"]
    config = WAN_CONFIGS[task]
    width, height = _size(args, task, config, SUPPORTED_SIZES[task], why)
    fps = _positive("--fps", args.fps, config.sample_fps, "fps", why)
    num_frames = _num_frames(args, task, config, fps, why)
    asked = Asked(task=task, config=config, width=width, height=height, num_frames=num_frames, fps=fps)
    given = read_inputs(args, asked) if inputs else None
    if given is not None:
        width, height = given.size or (width, height)
        num_frames = given.num_frames or num_frames
        why |= given.why
    check_video(height, width, asked.num_frames, stride=tuple(config.vae_stride), patch=tuple(config.patch_size))
    sampling = _sampling(args, config, asked, why)
    checkpoint = _checkpoint(args, repository, task, WAN_CONFIGS) if source is None else source.checkpoint
    return Wanted(
        task=task,
        config=config,
        checkpoint=checkpoint,
        prompt=_prompt(args, task, config, why),
        n_prompt=args.n_prompt or "",
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        seed=_seed(args.base_seed, why),
        noise_device=args.noise_device,
        load_format=args.load_format or "auto",
        files=_files(args),
        inputs=given,
        repository=None if args.load_format == "dummy" else repository,
        why=why,
        **sampling,
    )


def fetch(wanted: Wanted) -> None:
    """Download what is missing of a Hugging Face repository; nothing where the checkpoint is a folder."""
    if wanted.repository is not None and wanted.checkpoint is not None:
        from wan.configs import WAN_CONFIGS

        wanted.repository.download(wanted.config)
        check_folder(wanted.checkpoint, wanted.task, WAN_CONFIGS, wanted.files)


def _task(
    args: argparse.Namespace,
    repository: hub.Repository | None,
    configs: dict[str, Any],
    sizes: dict[str, Any],
    why: dict[str, str],
) -> str:
    task, why["task"] = args.task, "--task"
    if task is None and (args.ckpt_dir is not None or args.dit is not None):
        folder = None if args.ckpt_dir is None else Path(args.ckpt_dir).expanduser()
        folder = repository.folder if repository is not None else folder
        source = "--ckpt_dir" if args.dit is None else "--dit"
        task, why["task"] = detect_task(folder, configs, _files(args)), f"read from {source}"
    if task is None:
        task, why["task"] = DEFAULT_TASK, "default"
    if task in configs:
        return task
    able = ", ".join(configs)
    if why["task"] != "--task":
        flag = why["task"].rpartition("--")[2]
        held = f"--{flag} {getattr(args, flag)!r} holds {task}"
        raise BadRequest(f"{held}, which this version cannot run yet; it runs {able}")
    if task in sizes:
        raise BadRequest(f"--task {task!r} is not in this version yet; it runs {able}")
    raise BadRequest(f"--task {task!r} is unknown; use one of {able}")


def _size(
    args: argparse.Namespace, task: str, config: Any, trained: tuple[str, ...], why: dict[str, str]
) -> tuple[int, int]:
    """(width, height) of --size, or the program's default where the task has it, or the task's first landscape one."""
    if args.size is None:
        text = DEFAULT_SIZE if DEFAULT_SIZE in trained else max(trained, key=lambda name: parse_size(name)[0])
        why["size"] = f"default of {task}"
        return parse_size(text)
    why["size"] = f"--size {args.size}"
    width, height = parse_size(args.size)
    if args.any_size or f"{width}*{height}" in trained:
        return width, height
    stride, patch = tuple(config.vae_stride), tuple(config.patch_size)
    nearest = min(trained, key=lambda name: _distance(parse_size(name), (width, height)))
    free = "{}x{}".format(*nearest_size(width, height, stride=stride, patch=patch))
    raise BadRequest(
        f"--size {args.size!r}: {task} was trained on {', '.join(trained)}; the nearest is {nearest}. "
        f"--any_size allows every multiple of {multiples(stride, patch)[0]}, here {free}"
    )


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    """How unlike two sizes are: by shape and area, so that portrait is not taken for landscape."""
    return math.hypot(math.log(a[0] / max(b[0], 1)), math.log(a[1] / max(b[1], 1)))


def _num_frames(args: argparse.Namespace, task: str, config: Any, fps: int, why: dict[str, str]) -> int:
    image = task.startswith("t2i")
    stride = config.vae_stride[0]
    why["frames"] = f"default of {task}"
    wanted = 1 if image else config.frame_num
    if args.duration is not None:
        if not (math.isfinite(args.duration) and args.duration > 0):
            raise BadRequest(f"--duration {args.duration!r}: give a number of seconds greater than 0")
        wanted = frames_for(args.duration, fps, stride=stride)
        why["frames"] = f"--duration {args.duration:g} at {fps} frames per second"
    if args.frame_num is not None:
        if args.duration is not None and args.frame_num != wanted:
            raise BadRequest(
                f"--frame_num {args.frame_num} and --duration {args.duration:g} ({wanted} frames at {fps} fps) "
                "contradict each other: give one of them"
            )
        wanted, why["frames"] = args.frame_num, "--frame_num"
    if image and wanted != 1:
        raise BadRequest(f"{why['frames']}: {task} makes one image, so the frame count must be 1")
    try:
        check_frames(wanted, stride=stride)
    except BadRequest as error:
        raise BadRequest(f"{why['frames']}: {error}") from error
    return int(wanted)


def _sampling(args: argparse.Namespace, config: Any, asked: Asked, why: dict[str, str]) -> dict[str, Any]:
    steps = _positive("--sample_steps", args.sample_steps, config.get("sample_steps", 50), "steps", why)
    usual = config.get("sample_shift_of_size", {}).get(f"{asked.width}*{asked.height}", config.get("sample_shift", 5.0))
    shift = _positive("--sample_shift", args.sample_shift, usual, "shift", why)
    scale = args.sample_guide_scale
    if scale is None:
        scale, why["guidance"] = config.get("sample_guide_scale", 5.0), "task"
    else:
        why["guidance"] = "--sample_guide_scale"
    numbers = scale if isinstance(scale, tuple | list) else (scale,)
    if not all(math.isfinite(number) for number in numbers):
        raise BadRequest(f"--sample_guide_scale {scale!r}: give finite numbers, such as 5 or 3,4")
    if len(numbers) == 2 and "boundary" not in config and numbers[0] != numbers[1]:
        raise BadRequest(f"--sample_guide_scale {scale!r}: this task has one expert, so give one number")
    return {
        "steps": steps,
        "shift": shift,
        "solver": args.sample_solver or "unipc",
        "guide_scale": tuple(scale) if isinstance(scale, list) else scale,
    }


def _positive(flag: str, given: Any, default: Any, name: str, why: dict[str, str]) -> Any:
    if given is None:
        why[name] = "task"
        return default
    if not (math.isfinite(given) and given > 0):
        raise BadRequest(f"{flag} {given!r}: it must be greater than 0")
    why[name] = flag
    return given


def _seed(given: int | None, why: dict[str, str]) -> int:
    if given is None or given < 0:
        why["seed"] = "drawn"
        return random.randint(0, sys.maxsize)
    if given >= 2**64:
        raise BadRequest(f"--base_seed {given}: the largest seed is {2**64 - 1}")
    why["seed"] = "--base_seed"
    return given


def _prompt(args: argparse.Namespace, task: str, config: Any, why: dict[str, str]) -> str:
    if args.prompt is not None:
        why["prompt"] = "--prompt"
        return str(args.prompt)
    if "prompt" in config:
        why["prompt"] = f"default of {task}"
        return str(config.prompt)
    why["prompt"] = "example, as there is no --prompt"
    return EXAMPLE_PROMPTS.get(task) or EXAMPLE_PROMPTS.get(task.partition("-")[0]) or EXAMPLE_PROMPTS["t2v"]


def _checkpoint(
    args: argparse.Namespace, repository: hub.Repository | None, task: str, configs: dict[str, Any]
) -> Path | None:
    if args.load_format == "dummy" and _files(args) is None:
        return Path(args.ckpt_dir).expanduser() if args.ckpt_dir is not None else None
    files, folder = _files(args), None
    if args.ckpt_dir is None:
        if task not in SHIPPED and not files:
            raise no_folder(args.task)
        folder = shipped_folder(task) if not files else None
    elif repository is not None:
        check_kind(repository.name, repository.folder, task, configs, files)
        repository.check(task, configs[task])
        return repository.folder
    else:
        folder = Path(args.ckpt_dir).expanduser()
    check_folder(folder, task, configs, files)
    return folder


def _files(args: argparse.Namespace) -> CheckpointFiles | None:
    """The files named one by one; None where there are none. Raises BadRequest beside --load_format dummy."""
    parts = (each.name for each in fields(CheckpointFiles) if each.name != "loras")
    given = {name: getattr(args, name) for name in parts if getattr(args, name) is not None}
    if args.load_format == "dummy":
        for name in given:
            raise BadRequest(f"--{name} and --load_format dummy contradict each other: leave one of them out")
        return None
    loras = tuple((name, parsed(text, f"--{name}").path) for name in LORA_FLAGS for text in getattr(args, name) or ())
    return CheckpointFiles(**given, loras=loras) if given or loras else None
