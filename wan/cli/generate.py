"""`generate.py`: a command line in, a video file out. Everything is checked before a weight is read.

Goes through the public classes exactly as a user's own script would: `wan.WanT2V(...)`, `.generate(...)` and
`wan.utils.utils.save_video(...)` are looked up when they are called and get upstream's arguments by upstream's names.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import env, memory, pipelines
from wan.cli.report import Notes, Terminal, end_lines, start_lines
from wan.cli.signals import exit_status, stoppable
from wan.engine.errors import BadRequest, GenerationFailed, OutputError

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from wan.cli.budget import Budget
    from wan.cli.extension import Extension
    from wan.cli.naming import Claims
    from wan.cli.presets import Preset
    from wan.cli.request import Source, Wanted
    from wan.embeddings import EmbeddingCache
    from wan.engine.hardware import Hardware
    from wan.engine.plan import Optimization, Plan
    from wan.engine.prediction import Prediction
    from wan.video import Output


@dataclass(frozen=True, kw_only=True)
class Care:
    """What is kept while a video is made. `resume` is the folder of a run to continue, `latents` a file to decode."""

    state_every: int = 5
    keep_latents: bool = False
    timeout_s: float | None = None
    metadata: bool = True
    sidecar: bool = True
    resume: Path | None = None
    latents: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the jobs of a queue have in common and is looked at once. `tried` are the kinds of output that work."""

    source: Source
    hardware: Hardware
    tried: set[tuple[Any, ...]] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked command line: what to make, how to run it, where it goes. `plain` is the plan of all defaults.

    `prediction` is what it was chosen by where there is a `budget`. `record` is what repeats the video, `extend` says
    who rewrites its prompt first, `embeddings` keeps those of its texts, `notes` are for the user to read before it is
    made.
    """

    wanted: Wanted
    plan: Plan
    plain: Plan
    hardware: Hardware
    output: Output
    device: str | None
    crf: int | None
    care: Care = Care()
    preset: Preset | None = None
    budget: Budget | None = None
    prediction: Prediction | None = None
    record: dict[str, Any] = field(default_factory=dict)
    extend: Extension | None = None
    embeddings: EmbeddingCache | None = None
    notes: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None, *, default_preset: str = "none", variables: bool = False) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status; see `--help` for its values.

    With `variables` the environment may say some of the flags: `wan.cli.variables`.
    """
    env.prepare()
    terminal = Terminal(io.StringIO() if env.rank() else None)

    def act() -> int:
        with stoppable(), Notes(terminal):
            args = read(sys.argv[1:] if argv is None else argv, terminal, variables=variables)
            return run(args, terminal, default_preset)

    return exit_status(act, terminal)


def read(argv: Sequence[str], terminal: Terminal, *, variables: bool) -> argparse.Namespace:
    """The namespace of a command line, filled from the environment where that is asked for. Raises BadRequest."""
    from wan.cli.args import parse
    from wan.cli.extension import tell_unused
    from wan.cli.variables import fill
    from wan.engine.optimizations import registry
    from wan.engine.plan import options

    args = parse(argv, options(registry()))
    for line in fill(args, env.environment()) if variables else ():
        terminal.note(line)
    tell_unused(args)
    return args


def run(args: argparse.Namespace, terminal: Terminal, default_preset: str) -> int:
    """Check, then make the video. Raises WanError."""
    from wan.cli.answers import answered
    from wan.cli.extension import extended_and_named
    from wan.cli.naming import Claims
    from wan.cli.variables import named
    from wan.engine.optimizations import registry

    known = registry()
    if answered(args, known, terminal, default_preset):
        return 0
    with Claims() as claims, named(args):
        if args.prompt_file is not None:
            from wan.cli.queue import run_queue

            return run_queue(args, known, default_preset, claims, terminal)
        for name in ("expert_batch", "results"):
            if getattr(args, name) is not None:
                said = f"--{name} {getattr(args, name)}"
                raise BadRequest(f"{said} is for many videos: add --prompt_file or leave it out")
        job = check(args, known, default_preset, claims)
        announce(job, terminal)
        if args.print_plan:
            tell_plan(job, terminal)
            return 0
        return make(extended_and_named(args, job, claims, terminal), terminal)


def announce(job: Job, terminal: Terminal) -> None:
    """Say what will be made, and how."""
    from wan.engine.budget import describe_budget

    foreseen = [] if job.prediction is None else describe_budget(job.prediction)
    for line in (*start_lines(job.wanted, job.plan, job.hardware, job.preset), *foreseen):
        terminal.line(line)
    if job.extend is not None:
        terminal.line(f"extend  {job.extend}")
    for line in job.notes:
        terminal.note(line)


def tell_plan(job: Job, terminal: Terminal) -> None:
    """Say every option with the reason for its value, and what is known of the networks."""
    from wan.cli.plan_table import network_lines, option_lines

    for line in (*option_lines(job.plan), *network_lines(job)):
        terminal.line(line)


def make(job: Job, terminal: Terminal) -> int:
    """Generate, save."""
    path = produce(job, terminal)
    terminal.line(f"times   {terminal.times()}")
    terminal.line(f"saved   {path}")
    print(path)
    return 0


def produce(job: Job, terminal: Terminal) -> Path:
    """The finished file. A class or a writer that is not ours gets and gives tensors, as upstream's do."""
    from wan.cli.production import Production

    pipeline = pipelines.build(job, terminal)
    if not pipelines.streams(pipeline):
        video = whole(pipeline, job, terminal)
        terminal.stage("save")
        save(job, video)
        terminal.end_stage()
        return job.output.path
    production = Production(job, terminal)
    try:
        pipelines.call(pipeline, job, **production.extras(pipeline))
        path = production.finish(pipeline)
    except BaseException as error:
        raise production.failed(pipeline, error) from error
    for line in end_lines(pipeline.report, memory.peak_bytes(job.hardware.device), job.hardware):
        terminal.line(line)
    return path


def check(args: argparse.Namespace, registry: Sequence[type[Optimization]], default_preset: str, claims: Claims) -> Job:
    """The job of a namespace, or the first reason why it cannot be done. No weight is read."""
    from wan.cli.environment import known_bad
    from wan.cli.extension import carried
    from wan.cli.recall import recall, refuse_to_replace
    from wan.cli.request import fetch

    recalled = recall(args)
    job = examine(args, registry, default_preset, claims, care=recalled.care)
    refuse_to_replace(job.output.path, recalled.care)
    if not args.print_plan:
        fetch(job.wanted)
    job = recorded(args, job)
    said = (*known_bad(job.record["versions"]), *recalled.notes, *recalled.differences(job.record))
    return carried(dataclasses.replace(job, notes=(*job.notes, *said)), recalled.repeated)


def recorded(args: argparse.Namespace, job: Job) -> Job:
    """`job` with its record, and with what is known by the hashes in it."""
    from wan.cli import record
    from wan.cli.caches import keep_compiled
    from wan.cli.embeddings import cache_for

    keep_compiled(args, job.plan)
    made = record.build(args, job)
    return dataclasses.replace(job, record=made, embeddings=cache_for(args, made))


def examine(
    args: argparse.Namespace,
    registry: Sequence[type[Optimization]],
    default_preset: str,
    claims: Claims,
    *,
    care: Care,
    shared: Shared | None = None,
) -> Job:
    """The job but for its record, with all checks that come before anything is downloaded."""
    from wan.cli import extension
    from wan.cli.budget import budget_of, within_budget
    from wan.cli.presets import plan_and_preset
    from wan.cli.quality_sets import notes
    from wan.cli.request import resolve
    from wan.engine.plan import Plan

    here = machine(args, registry) if shared is None else shared.hardware
    wanted = resolve(args, shared.source if shared is not None else None)
    (plan, preset), prediction = plan_and_preset(args, registry, here, default_preset), None
    budget = budget_of(args, here, args.preset or default_preset, preset.reserve_vram if preset else None)
    if budget is not None:
        plan, prediction = within_budget(args, wanted, plan, registry, here, budget)
    output = _output(args, wanted, claims, shared.tried if shared is not None else set())
    return Job(
        wanted=wanted, plan=plan, plain=Plan.of(registry, {}), hardware=here, output=output, device=args.device,
        crf=args.crf, care=care, extend=extension.asked(args, wanted), preset=preset, budget=budget,
        prediction=prediction, notes=(*notes(args, wanted), *plan.idle()),
    )  # fmt: skip


def machine(args: argparse.Namespace, registry: Sequence[type[Optimization]]) -> Hardware:
    """Where the command line runs. Raises BadRequest, or IncompatibleOptions for several processes."""
    from wan.cli.budget import imagined
    from wan.cli.presets import refuse_several_processes
    from wan.engine.hardware import world

    refuse_several_processes(registry, world()[1])
    return imagined(args, _hardware(args, world()[2]))


def whole(pipeline: Any, job: Job, terminal: Terminal) -> Tensor:
    """The video [3, N, H, W] in -1..1 of a class that takes upstream's arguments alone."""
    from wan.engine.attempts import is_out_of_memory

    try:
        video = pipelines.call(pipeline, job)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = pipelines.memory_advice(job.plan)
        raise GenerationFailed(f"out of GPU memory during {terminal.current!r}: {advice}") from error
    if video is None:
        raise GenerationFailed(f"{type(pipeline).__name__}.generate returned no video")
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
            if job.output.sound is not None:
                writers.merge_video_audio(video_path=path, audio_path=str(job.output.sound.path))
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
            f"All {len(pixels)} frames are kept in {str(kept)!r} (torch.load gives uint8 [N, H, W, 3]); "
            "write them with wan.video.VideoSink.write_pixels"
        )
    return "The frames could not be kept anywhere either: no folder tried is writable"


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


def output_path(args: argparse.Namespace, wanted: Wanted, claims: Claims) -> Path:
    """The file that --save_file names, which may be overwritten; else a new one in the folder it names."""
    from wan.cli import naming

    ending, now = ".png" if wanted.num_frames == 1 else ".mp4", time.localtime()
    pattern = None if args.name is None else naming.Pattern(args.name)
    path = Path(args.save_file or "").expanduser()
    if not names_file(args):
        if pattern is None:
            return claims.first_free(path, naming.default_paths(wanted, ending, now))
        return claims.first_free(path, naming.pattern_paths(pattern, wanted, ending, now))
    if pattern is not None:
        raise BadRequest(f"--save_file {args.save_file!r} is a file name and --name makes one: give one, or a folder/")
    return path


def names_file(args: argparse.Namespace) -> bool:
    """True where --save_file is the name of the file, not of a folder."""
    given = str(args.save_file or "")
    return bool(given) and not given.endswith(("/", "\\")) and not Path(given).expanduser().is_dir()


def _output(args: argparse.Namespace, wanted: Wanted, claims: Claims, tried: set[tuple[Any, ...]]) -> Output:
    """Where the result goes, tried with two frames unless such an output is among those that were."""
    from wan.video import Output, test_encode

    path = output_path(args, wanted, claims)
    sound = None if wanted.inputs is None else wanted.inputs.sound
    output = Output(path, fps=wanted.fps, sound=sound, **({} if args.crf is None else {"crf": args.crf}))
    size = (wanted.width, wanted.height, wanted.num_frames)
    kind = (path.parent.absolute(), path.suffix.lower(), output.fps, output.crf, sound, *size)
    if kind in tried:
        return output
    try:
        test_encode(output, height=wanted.height, width=wanted.width, num_frames=wanted.num_frames)
    except OutputError as error:
        raise BadRequest(f"--save_file: {error}") from error
    tried.add(kind)
    return output
