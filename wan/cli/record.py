"""What a video was made by: written into the file and beside it, read back by `--from`, `--resume` and `--decode`.

A record is JSON. Its `flags` are complete and resolved, so that they make the video again whatever defaults become;
`wan.cli.replay` puts them back into a command line and tells what is different now.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wan
from wan.cli import environment, fingerprints, memory
from wan.cli.replay import apply, changed_weights, differences, require_same_start
from wan.cli.report import pace
from wan.engine.errors import BadRequest, WanError
from wan.engine.optimizations import FewStep, LoRA
from wan.runs import RECORD, write_whole

if TYPE_CHECKING:
    from wan.cli.generate import Job
    from wan.cli.request import Wanted
    from wan.engine.accounting import Report
    from wan.engine.hardware import Hardware
    from wan.video import VideoInfo

__all__ = [
    "FORMAT",
    "Tags",
    "apply",
    "build",
    "changed_weights",
    "complete",
    "differences",
    "peak_bytes",
    "read",
    "require_same_start",
    "sidecar_path",
    "write_sidecar",
]

FORMAT = 1


def build(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The record of a job that is about to run. Reads a little of each weight file, unless it is known."""
    record = {
        "format": FORMAT,
        "version": wan.__version__,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "flags": _flags(args, job),
        "preset": args.preset,
        "plan": _plan(job),
        "versions": environment.versions(),
        "device": environment.device(job.hardware),
        "weights": _weights(job.wanted) | fingerprints.of_parts(_loras(job).items()),
        "inputs": fingerprints.of_parts(_inputs(job).items()),
        "output": {"path": os.path.abspath(job.output.path), "fps": job.output.fps, "crf": job.output.crf},
    }
    sound: dict[str, Any] = _sound(record)
    return sound


def complete(
    record: Mapping[str, Any],
    *,
    report: Report | None,
    stages: Iterable[tuple[str, float]],
    peak_bytes: int | None,
    frames: VideoInfo | None = None,
) -> dict[str, Any]:
    """`record` with "result": what the run did and took. `report` None is a class that does not count."""
    seconds: dict[str, float] = {}
    for name, took in stages:
        seconds[name] = seconds.get(name, 0.0) + took
    result: dict[str, Any] = {"seconds": round(sum(seconds.values()), 3)}
    result["stages_s"] = {name: round(took, 3) for name, took in seconds.items()}
    if report is not None:
        result |= _experts(report) | {"forwards": _forwards(report)}
        result |= {} if (saved := report.saved_forwards()) is None else {"plain_forwards": saved[1]}
        result |= {"decode": report.decode, "attention": dict(report.kernels)}
        result |= {"encode": report.encode} if report.encode else {}
        result |= {"compile_s": round(report.compile_seconds, 3)} if report.compile_seconds else {}
    if peak_bytes is not None:
        where = "gpu" if record.get("device", {}).get("type") == "cuda" else "ram"
        result[f"peak_{where}_bytes"] = peak_bytes
    if frames is not None:
        result["video"] = frames._asdict()
    return {**record, "result": result}


class Tags(Mapping[str, str]):
    """What carries a record inside a video or image: players show the title, the comment is the record as JSON.

    `record` is asked once, when a writer takes the texts: with the first frame, so that a denoise that is over can be
    told of. What comes later stands in the sidecar alone.
    """

    def __init__(self, record: Callable[[], Mapping[str, Any]]) -> None:
        self._record = record

    @cached_property
    def _texts(self) -> dict[str, str]:
        record = self._record()
        return {"title": record["flags"]["prompt"], "comment": json.dumps(record, ensure_ascii=False)}

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("title", "comment"))

    def __len__(self) -> int:
        return 2


def peak_bytes(hardware: Hardware) -> int | None:
    """The most memory needed so far: allocated on the GPU, else resident in RAM."""
    return memory.peak_bytes(hardware.device)


def sidecar_path(video: Path) -> Path:
    """Where the record lies beside a video; the whole name stays, as NAME.json may be a file of the user's."""
    return video.with_name(f"{video.name}.json")


def write_sidecar(record: Mapping[str, Any], path: Path) -> None:
    """Raises OSError; the file is there whole or not at all."""
    write_whole(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """The record in a video, an image, a sidecar, kept latents or state, or the folder of a run. Raises BadRequest."""
    path = Path(path)
    if path.is_dir():
        path = path / RECORD
    if not path.is_file():
        raise BadRequest(f"--from {str(path)!r}: there is no such file; pass a video, its .json or kept latents")
    if path.suffix.lower() == ".json":
        return _checked(_text(path), path)
    if path.suffix.lower() == ".safetensors":
        return _checked(_tensor_record(path), path)
    return _of_video(path)


# What is recorded ---------------------------------------------------------------------------------------------------


def _flags(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What to spell to make this again, by the names of the namespace."""
    wanted = job.wanted
    flags: dict[str, Any] = {
        "task": wanted.task,
        "prompt": wanted.prompt,
        "n_prompt": wanted.n_prompt or wanted.config.get("sample_neg_prompt", ""),
        "size": wanted.size_name,
        "any_size": bool(args.any_size),
        "frame_num": wanted.num_frames,
        "base_seed": wanted.seed,
        "noise_device": wanted.noise_device or job.hardware.device.type,
        "sample_solver": wanted.solver,
        "sample_steps": wanted.steps,
        "sample_shift": wanted.shift,
        "sample_guide_scale": list(wanted.guide_scale) if isinstance(wanted.guide_scale, tuple) else wanted.guide_scale,
        "fps": wanted.fps,
        "crf": job.output.crf,
        "load_format": wanted.load_format,
    }
    if args.ckpt_dir is not None:
        flags["ckpt_dir"] = wanted.repository.name if wanted.repository is not None else _absolute(args.ckpt_dir)
    if wanted.files is not None:
        flags |= {name: _absolute(file) for name, file in wanted.files.named().items()}
    if wanted.inputs is not None:
        flags |= wanted.inputs.flags
    # What an option brought is brought again, from where it then lies.
    return flags | {n: value for n, value in _plan(job).items() if value is not None and n not in job.plan.brought}


def _plan(job: Job) -> dict[str, Any]:
    """Every option by name, as JSON gives it back, with files spelled so that they mean the same in any folder."""
    files = {name: value for each in job.plan.optimizations for name, value in each.absolute().items()}
    return job.plan.values() | files


def _absolute(path: str | Path) -> str:
    return os.path.abspath(Path(path).expanduser())


def _weights(wanted: Wanted) -> dict[str, dict[str, str]]:
    """Part -> its file and hash; {} for random weights."""
    from wan.layouts import locate

    if wanted.load_format == "dummy":
        return {}
    places = locate(wanted.checkpoint, wanted.config, wanted.files, wanted.task.partition("-")[0].replace("t2i", "t2v"))
    found = {}
    for part, path in places.paths.items():
        if path is None or not path.exists():  # a tokenizer inside another file; a download yet to come
            continue
        try:
            found[part] = path if part == "tokenizer" else places.weights(part)
        except WanError:
            continue
    return fingerprints.of_parts(found.items())


def _loras(job: Job) -> dict[str, Path]:
    """What is merged into the weights, by a name for each."""
    wanted, paths = job.wanted, job.plan.get(LoRA).paths
    switches = {} if wanted.inputs is None else wanted.inputs.construct
    if wanted.checkpoint is not None and switches.get("use_relighting_lora"):
        paths = [wanted.checkpoint / wanted.config.lora_checkpoint, *paths]
    return {f"lora {number}": path for number, path in enumerate(paths, 1)}


def _inputs(job: Job) -> dict[str, Path]:
    """The files that say what to make, by their flags."""
    files = {} if job.wanted.inputs is None else dict(job.wanted.inputs.files)
    recipe = job.plan.get(FewStep).file
    return files if recipe is None else files | {"few_step": recipe}


def _sound(value: Any) -> Any:
    """`value` with texts that any JSON reader takes: an argument that was not valid UTF-8 loses the broken letters."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_sound(key): _sound(entry) for key, entry in value.items()}
    return [_sound(entry) for entry in value] if isinstance(value, list) else value


# The result ---------------------------------------------------------------------------------------------------------


def _experts(report: Report) -> dict[str, Any]:
    """Seconds, steps and pace of each expert."""
    result: dict[str, Any] = {}
    for expert, seconds in report.step_seconds.items():
        result[f"{expert}_s"] = round(sum(seconds), 3)
        result[f"{expert}_steps"] = len(seconds)
        result[f"{expert}_s_per_step"] = round(pace(seconds), 4)
    return result


def _forwards(report: Report) -> dict[str, dict[str, dict[str, Any]]]:
    """Expert -> branch -> forwards done and planned, of all shots; a plan that is a range is [fewest, most]."""
    counts: dict[str, dict[str, list[int]]] = {}
    for forwards in report.forwards:
        for (expert, branch), (low, high) in forwards.planned.items():
            count = counts.setdefault(expert, {}).setdefault(branch, [0, 0, 0])
            for i, number in enumerate((forwards.done[expert, branch], low, high)):
                count[i] += number
    return {
        expert: {
            branch: {"done": done, "planned": low if low == high else [low, high]}
            for branch, (done, low, high) in branches.items()
        }
        for expert, branches in counts.items()
    }


# Reading ------------------------------------------------------------------------------------------------------------


def _of_video(path: Path) -> dict[str, Any]:
    """What is inside the file; the record beside it where that is of the same run, as it knows the result too."""
    from wan.video import read_metadata

    inside, beside = read_metadata(path).get("comment", ""), sidecar_path(path)
    if not inside.lstrip().startswith("{"):
        if beside.is_file():
            return _checked(_text(beside), beside)
        raise BadRequest(
            f"--from {str(path)!r} holds no record: it was made with --no_metadata or by another program, or lost it "
            "on the way; pass its .json, or spell the flags"
        )
    record = _checked(inside, path)
    if beside.is_file():
        try:
            complete = _checked(_text(beside), beside)
        except BadRequest:
            return record
        return complete if complete.get("created") == record.get("created") else record
    return record


def _tensor_record(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("record")
    except (OSError, SafetensorError) as error:
        raise BadRequest(f"--from {str(path)!r} cannot be read ({error}); pass another file") from error
    if found is None:
        raise BadRequest(f"--from {str(path)!r} holds no record: pass latents or state that generate.py kept")
    return str(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadRequest(f"--from {str(path)!r} cannot be read ({error}); pass another file") from error


def _checked(text: str, path: Path) -> dict[str, Any]:
    """The record in `text`, with every part in it that a record has."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"--from {str(path)!r}: its record is damaged ({error}); spell the flags instead") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise BadRequest(f"--from {str(path)!r} holds JSON that is no record of generate.py; pass another file")
    if record["format"] > FORMAT:
        raise BadRequest(
            f"--from {str(path)!r}: its record has format {record['format']}, made by version {record.get('version')}; "
            f"this is {wan.__version__}, which reads {FORMAT}: use that version, or spell the flags"
        )
    for name in ("flags", "prompt_extension", "plan", "versions", "device", "weights", "inputs", "output", "result"):
        if not isinstance(record.get(name, {}), dict):
            raise BadRequest(f"--from {str(path)!r}: {name!r} in its record is no table; spell the flags instead")
    return record
