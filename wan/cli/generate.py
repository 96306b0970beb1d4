"""`generate.py`: a command line in, a video file out. Everything is checked before a weight is read.

Goes through the public classes exactly as a user's own script would: `wan.WanT2V(...)`, `.generate(...)` and
`wan.utils.utils.save_video(...)` are looked up when they are called and get upstream's arguments by upstream's names.
"""

from __future__ import annotations

import inspect
import io
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import env
from wan.cli.report import Notes, Terminal, start_lines
from wan.engine.errors import BadRequest, GenerationFailed, IncompatibleOptions, OutputError, WanError

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from wan.cli.naming import Claims
    from wan.cli.request import Wanted
    from wan.engine.hardware import Hardware
    from wan.engine.plan import Optimization, Plan
    from wan.video import Output

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked command line: what to make, how to run it, where it goes. `plain` is the plan of all defaults."""

    wanted: Wanted
    plan: Plan
    plain: Plan
    hardware: Hardware
    output: Output
    device: str | None
    crf: int | None


def main(argv: Sequence[str] | None = None, *, default_preset: str = "none") -> int:
    """Run the command line `argv` (default: the process's) and return the exit status; see `--help` for its values."""
    env.prepare()
    terminal = Terminal(io.StringIO() if env.rank() else None)
    try:
        with Notes(terminal):
            return run(sys.argv[1:] if argv is None else argv, terminal, default_preset)
    except WanError as error:
        terminal.failed(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        terminal.line("interrupted")
        return INTERRUPTED
    except SystemExit as leaving:  # --help
        return int(leaving.code or 0)


def run(argv: Sequence[str], terminal: Terminal, default_preset: str) -> int:
    """Check, then make the video. Raises WanError."""
    from wan.cli.args import parse
    from wan.cli.naming import Claims
    from wan.engine.optimizations import registry
    from wan.engine.plan import options

    known = tuple(registry())
    args = parse(argv, options(known))
    with Claims() as claims:
        return make(check(args, known, default_preset, claims), terminal, print_plan=bool(args.print_plan))


def make(job: Job, terminal: Terminal, *, print_plan: bool = False) -> int:
    """Announce, generate, save."""
    for line in start_lines(job.wanted, job.plan, job.hardware):
        terminal.line(line)
    if print_plan:
        return 0
    video = generate(job, terminal)
    terminal.stage("save")
    save(job, video)
    terminal.end_stage()
    terminal.line(f"times   {terminal.times()}")
    terminal.line(f"saved   {job.output.path}")
    print(job.output.path)
    return 0


def check(args: argparse.Namespace, registry: Sequence[type[Optimization]], default_preset: str, claims: Claims) -> Job:
    """The job of a namespace, or the first reason why it cannot be done. No weight is read."""
    from wan.cli.presets import make_plan, refuse_several_processes
    from wan.cli.request import fetch, resolve
    from wan.engine.hardware import world
    from wan.engine.plan import Plan

    refuse_several_processes(registry, world()[1])
    wanted = resolve(args)
    hardware = _hardware(args, world()[2])
    plan = make_plan(args, registry, hardware, default_preset)
    output = _output(args, wanted, claims)
    if not args.print_plan:
        fetch(wanted)
    return Job(
        wanted=wanted, plan=plan, plain=Plan.of(registry, {}), hardware=hardware, output=output,
        device=args.device, crf=args.crf,
    )  # fmt: skip


def generate(job: Job, terminal: Terminal) -> Tensor:
    """The video [3, N, H, W] in -1..1 of the task's class in `wan`, called as upstream's program calls it."""
    import wan
    from wan.families import class_name

    wanted, values = job.wanted, plan_values(job.plan)
    pipeline_class = getattr(wan, class_name(wanted.task))
    beyond = {
        "optimizations": (job.plan, _beyond_upstream(job)),
        "device": (job.device, job.device is not None),
        "load_format": (wanted.load_format, wanted.load_format != "auto"),
        "progress": (terminal, False),
    }
    noise = {"noise_device": (wanted.noise_device, True)} if wanted.noise_device else {}
    negative = {"n_prompt": wanted.n_prompt} if wanted.n_prompt else {}
    try:
        pipeline = pipeline_class(
            config=wanted.config,
            checkpoint_dir=None if wanted.checkpoint is None else str(wanted.checkpoint),
            device_id=job.hardware.device.index or 0,
            rank=job.hardware.rank,
            t5_fsdp=bool(values.get("t5_fsdp")),
            dit_fsdp=bool(values.get("dit_fsdp")),
            use_sp=(values.get("ulysses_size") or 1) > 1,
            t5_cpu=bool(values.get("t5_cpu")),
            convert_model_dtype=bool(values.get("convert_model_dtype")),
            **_accepted(pipeline_class, beyond),
        )
        video = pipeline.generate(
            wanted.prompt,
            size=(wanted.width, wanted.height),
            frame_num=wanted.num_frames,
            shift=wanted.shift,
            sample_solver=wanted.solver,
            sampling_steps=wanted.steps,
            guide_scale=wanted.guide_scale,
            seed=wanted.seed,
            offload_model=bool(values.get("offload_model")),
            **negative,
            **_accepted(pipeline.generate, noise),
        )
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise GenerationFailed(f"out of GPU memory during {terminal.current!r}: {_memory_advice(values)}") from error
    if video is None:
        raise GenerationFailed(f"{pipeline_class.__name__}.generate returned no video")
    return video


def save(job: Job, video: Tensor) -> None:
    """Write the video through upstream's functions. Raises OutputError, naming where the frames were kept instead."""
    from wan.utils import utils as writers

    path = str(job.output.path)
    shared: dict[str, Any] = {"save_file": path, "nrow": 1, "normalize": True, "value_range": (-1, 1)}
    before = _written(job.output.path)
    try:
        if job.output.is_image:
            writers.save_image(tensor=video.squeeze(1)[None], **shared)
        else:
            quality: dict[str, Any] = {} if job.crf is None else {"crf": job.crf}
            writers.save_video(tensor=video[None], fps=job.wanted.fps, **shared, **quality)
        if _written(job.output.path) in (None, before):
            raise OutputError(f"{path!r} was not written")
    except Exception as error:  # whatever the writer did, the frames must survive it
        raise OutputError(f"{error}. {keep_frames(video, job.output.path)}") from error


def _written(path: Path) -> int | None:
    """When `path` was last written; None where there is no such file."""
    return path.stat().st_mtime_ns if path.is_file() else None


def keep_frames(video: Tensor, path: Path) -> str:
    """Store the frames as uint8 [N, H, W, 3] near `path`, or where else there is room, and say where."""
    import torch

    from wan.video import to_pixels

    pixels = to_pixels(video).cpu()
    for folder in (path.parent, Path.cwd(), Path(tempfile.gettempdir())):
        kept = folder / f"{path.stem}.frames.pt"
        try:
            torch.save(pixels, kept)
        except (OSError, RuntimeError):
            kept.unlink(missing_ok=True)
            continue
        return (
            f"All {len(pixels)} frames are kept in {str(kept)!r} (torch.load gives uint8 [N, H, W, 3]): free space or "
            "choose another --save_file, then write them with wan.video.VideoSink.write_pixels"
        )
    return "The frames could not be kept anywhere either: no folder tried is writable"


def plan_values(plan: Plan) -> dict[str, Any]:
    """Every option of the plan by name."""
    return {name: value for optimization in plan.optimizations for name, value in vars(optimization).items()}


def _beyond_upstream(job: Job) -> bool:
    """True when the plan says something that upstream's own arguments cannot."""
    own = {"t5_fsdp", "dit_fsdp", "ulysses_size", "t5_cpu", "convert_model_dtype", "offload_model", "attention"}
    plain = plan_values(job.plain)
    return any(value != plain[name] for name, value in plan_values(job.plan).items() if name not in own)


def _accepted(function: Callable[..., Any], extras: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
    """Those of `extras` (name -> value, whether it must arrive) that `function` takes; upstream's classes take none."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    passed = {}
    for name, (value, needed) in extras.items():
        if (takes_any or name in parameters) and value is not None:
            passed[name] = value
        elif needed:
            what = getattr(function, "__qualname__", str(function))
            raise IncompatibleOptions(f"{what} does not take {name}={value!r}: leave the flags out that ask for it")
    return passed


def _hardware(args: argparse.Namespace, local_rank: int) -> Hardware:
    import torch

    from wan.engine.hardware import probe

    for flag, text in (("--device", args.device), ("--noise_device", args.noise_device)):
        if text is None:
            continue
        try:
            device = torch.device(text)
        except RuntimeError as error:
            raise BadRequest(f"{flag} {text!r} is not a device: use cpu, cuda or cuda:N") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise BadRequest(f"{flag} {text!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
        if device.type not in ("cpu", "cuda"):
            raise BadRequest(f"{flag} {text!r}: use cpu, cuda or cuda:N")
    return probe(args.device, local_rank)


def _path(args: argparse.Namespace, wanted: Wanted, claims: Claims) -> Path:
    """The file that --save_file names, which may be overwritten; else a new one in the folder it names."""
    from wan.cli import naming

    ending, now = ".png" if wanted.num_frames == 1 else ".mp4", time.localtime()
    pattern = None if args.name is None else naming.Pattern(args.name)
    path = Path(args.save_file or "").expanduser()
    if args.save_file in (None, "") or path.is_dir() or str(args.save_file).endswith(("/", "\\")):
        if pattern is None:
            return claims.first_free(path, naming.default_paths(wanted, ending, now))
        return claims.first_free(path, naming.pattern_paths(pattern, wanted, ending, now))
    if pattern is not None:
        raise BadRequest(f"--save_file {args.save_file!r} is a file name and --name makes one: give one, or a folder/")
    return path


def _output(args: argparse.Namespace, wanted: Wanted, claims: Claims) -> Output:
    """Where the result goes, tried with two frames."""
    from wan.video import Output, test_encode

    path = _path(args, wanted, claims)
    output = Output(path, fps=wanted.fps, **({} if args.crf is None else {"crf": args.crf}))
    try:
        test_encode(output, height=wanted.height, width=wanted.width, num_frames=wanted.num_frames)
    except OutputError as error:
        raise BadRequest(f"--save_file: {error}") from error
    return output


def _memory_advice(values: Mapping[str, Any]) -> str:
    """What to try next, leaving out what is on already."""
    savers = ("offload_model", "vae_cpu", "convert_model_dtype")
    off = [f"--{name}" + " True" * (name == "offload_model") for name in savers if values.get(name) is False]
    return "try " + ", ".join([*off, "a smaller --size", "fewer --frame_num"])
