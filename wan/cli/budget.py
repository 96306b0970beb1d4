"""`--vram_budget`, `--reserve_vram` and `--find_max`: from flags and a machine to a choice of options, and into a plan.

Flags win over what is chosen, what is chosen wins over the preset.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wan.cli.cards import CARDS, SHEETS
from wan.cli.checkpoint import components_of
from wan.cli.memory import available_ram
from wan.cli.quality_sets import may_use
from wan.engine.budget import CHOSEN, MARGIN_BYTES, Planner, Wishes, gigabytes
from wan.engine.errors import BadCheckpoint, BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.optimizations import FP8, T5FP8, Compile, ContextWindows, FewStep, LoRA, Precision
from wan.engine.plan import Plan, options
from wan.engine.prediction import CONTEXT_BYTES, PLAIN, Beside, Models, Prediction, Video
from wan.engine.roofline import Card, card_for, card_of
from wan.sizes import models_of

if TYPE_CHECKING:
    from wan.cli.generate import Job
    from wan.cli.request import Wanted
    from wan.engine.plan import Optimization
    from wan.engine.types import Component
    from wan.layouts import CheckpointFiles


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes of GPU memory the process may take, as the driver counts. `asked` is False where nobody set a limit."""

    size: int
    asked: bool

    def enforce(self, hardware: Hardware) -> None:
        """Let torch refuse what goes beyond, where a limit was asked for."""
        if self.asked and hardware.is_cuda:
            share = min(1.0, max(0, self.size - CONTEXT_BYTES) / hardware.total_memory)
            torch.cuda.set_per_process_memory_fraction(share, hardware.device)


def imagined(args: argparse.Namespace, here: Hardware) -> Hardware:
    """`here`; or, where only a look at a budget is asked for and no GPU is here, a card that has it.

    That of the preset that is named, else the smallest known one.
    """
    if here.is_cuda or args.vram_budget is None or not (args.print_plan or args.find_max):
        return here
    named = next((SHEETS[card.sheet] for card in CARDS if card.preset == args.preset), None)
    sheet = named if named is not None and named.memory >= args.vram_budget else card_for(args.vram_budget)
    sm = next(card.sm for card in CARDS if card.sheet == sheet.name)
    memory = max(sheet.memory, args.vram_budget)  # a card sold with 24 GB has a little less
    return Hardware(
        device=torch.device("cuda"), name=sheet.name, sm=sm, total_memory=memory, free_memory=memory, here=False
    )


def budget_of(args: argparse.Namespace, hardware: Hardware, preset: str, reserved: int | None = None) -> Budget | None:
    """What there is to plan with; None where nothing asks for a plan. Raises BadRequest.

    `preset` is the one that acts: `auto` plans wherever there is a GPU. `reserved` is what it leaves to others.
    """
    asked, reserved = args.vram_budget, reserved if args.reserve_vram is None else args.reserve_vram
    wanted = args.find_max is not None or (preset == "auto" and hardware.is_cuda)
    if asked is None and reserved is None and not wanted:
        return None
    if not hardware.is_cuda:
        raise _no_gpu(args, reserved)
    left = hardware.free_memory + CONTEXT_BYTES - MARGIN_BYTES
    if reserved is not None:
        left = hardware.total_memory - reserved
        if left <= 0:
            raise BadRequest(f"--reserve_vram {gigabytes(reserved)}: {hardware.name} has no more; reserve less")
    return Budget(size=left if asked is None else min(asked, left), asked=not (asked is None and reserved is None))


def _no_gpu(args: argparse.Namespace, reserved: int | None) -> BadRequest:
    """Why there is nothing to plan with."""
    if args.vram_budget is not None:
        return BadRequest(
            f"--vram_budget {gigabytes(args.vram_budget)}: there is no GPU here to keep within it; leave it out, or "
            "add --print_plan to see what would be chosen on one"
        )
    if args.find_max is not None:
        return BadRequest(
            f"--find_max {args.find_max}: there is no GPU here; say how much memory one has, as in --vram_budget 12GB"
        )
    return BadRequest(f"--reserve_vram {gigabytes(reserved or 0)}: there is no GPU here to reserve it on; leave it out")


def within_budget(
    args: argparse.Namespace,
    wanted: Wanted,
    plan: Plan,
    registry: Sequence[type[Optimization]],
    hardware: Hardware,
    budget: Budget,
) -> tuple[Plan, Prediction]:
    """`plan` with the fastest choice that fits in place of what no flag says. Raises IncompatibleOptions."""
    planner = planner_of(args, wanted, plan, registry, hardware, budget)
    try:
        found = planner.choose(budget.size)
    except IncompatibleOptions as refusal:
        if budget.asked:
            raise
        raise IncompatibleOptions(f"{refusal}; --preset none tries it without a plan") from refusal
    changed = _with_choice(plan, found, registry)
    changed.check(hardware)
    return changed, found


def _with_choice(plan: Plan, found: Prediction, registry: Sequence[type[Optimization]]) -> Plan:
    """`plan` with what was chosen, and why."""
    free = found.reasons.keys() & {o.name for o in options(registry)}
    chosen = {name: found.values[name] for name in free}
    reasons = {**plan.reasons, **{name: f"budget: {found.reasons[name]}" for name in free}}
    return Plan.of(registry, plan.own_values() | chosen, source="budget", reasons=reasons)


def in_step(jobs: list[Job], registry: Sequence[type[Optimization]]) -> list[Job]:
    """Jobs of a queue with one choice of all that must stand before networks are loaded: that of the largest video."""
    planned = [job for job in jobs if job.prediction is not None]
    if not planned:
        return jobs
    largest = max(planned, key=lambda job: job.wanted.width * job.wanted.height * job.wanted.num_frames)
    fixed = {o.name for kind in registry if not kind.per_call for o in options([kind])}
    reasons, values = largest.plan.reasons, largest.plan.values()
    same = {name: values[name] for name in fixed if reasons.get(name, "").startswith("budget")}
    return [job if job is largest or job.prediction is None else _in_step_with(job, same, registry) for job in jobs]


def _in_step_with(job: Job, same: Mapping[str, Any], registry: Sequence[type[Optimization]]) -> Job:
    """`job` with these values, and with what is the fastest beside them of what may be chosen for one call."""
    assert job.prediction is not None and job.budget is not None
    plan = job.plan.changed(registry, same, source="budget of the largest")
    names = {o.name for o in options(registry)} & PLAIN.keys()
    values = {name: value for name, value in plan.values().items() if name in names}
    pinned = {name: value for name, value in values.items() if name in same or name not in job.prediction.reasons}
    planner = _planner(job.wanted, plan, job.hardware, job.prediction.card, names, pinned)
    found = planner.choose(job.budget.size)
    return replace(job, plan=_with_choice(plan, found, registry), prediction=found)


def planner_of(
    args: argparse.Namespace,
    wanted: Wanted,
    plan: Plan,
    registry: Sequence[type[Optimization]],
    hardware: Hardware,
    budget: Budget,
    video: Video | None = None,
) -> Planner:
    """What chooses for this job; `video` replaces the one that is wanted."""
    names = {o.name for o in options(may_use(args, registry))} & PLAIN.keys()
    pinned = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, "auto")}
    fp8 = plan.get(FP8)
    if fp8.enabled:
        pinned["fp8"] = fp8.fp8  # a preset's too: what changes the picture is nobody's but the user's to choose
    elif not fp8.allowed:
        names -= {"fp8"}
    compiling = plan.get(Compile)
    if not (compiling.compile and compiling.mode == "default" and compiling.cuda_graphs is None and hardware.is_cuda):
        names -= {"cuda_graphs"}
    free = names.intersection(CHOSEN) - pinned.keys()
    names -= {name for name in free if _ruled_out(name, plan, free, hardware)}
    card = card_of(hardware.name, hardware.total_memory)
    return _planner(wanted, plan, hardware, card, names, pinned, video)


def _ruled_out(name: str, plan: Plan, free: Collection[str], hardware: Hardware) -> bool:
    """Whether an option that may be chosen does not go with what is on and stays."""
    kind = next(type(o) for o in plan.optimizations if name in vars(o))
    stays = {type(o) for o in plan.enabled() if vars(o).keys().isdisjoint(free)} - {kind}
    names = {other.__name__ for other in stays}
    theirs = [conflict for other in stays for conflict in other.conflicts if conflict.other == kind.__name__]
    return any(each.when(hardware) for each in (*theirs, *(own for own in kind.conflicts if own.other in names)))


def _planner(
    wanted: Wanted,
    plan: Plan,
    hardware: Hardware,
    card: Card,
    names: set[str],
    pinned: Mapping[str, Any],
    video: Video | None = None,
) -> Planner:
    """What chooses among the options `names`, of which `pinned` stay; all others are as in `plan`."""
    wishes = Wishes(
        available=frozenset(names), pinned=pinned, ram=available_ram() if hardware.here else None,
        others={name: value for name, value in plan.values().items() if name in PLAIN},
    )  # fmt: skip
    return Planner(models_for(wanted, plan), video or video_of(wanted, plan), card, wishes)


def models_for(wanted: Wanted, plan: Plan) -> Models:
    """The sizes of the networks of a job, from the headers of its files, or the task's where they are not there yet."""
    storing = tuple(each for each in (plan.get(Precision), plan.get(T5FP8)) if each.enabled)
    checkpoint = None if wanted.load_format == "dummy" else wanted.checkpoint
    components, models = _models(
        wanted.task, checkpoint, wanted.files, wanted.repository is not None, storing, plan.get(FP8).in_8_bits()
    )
    return replace(models, lora=_beside(plan, components, storing))


@lru_cache(maxsize=4)
def _models(
    task: str,
    folder: Path | None,
    files: CheckpointFiles | None,
    remote: bool,
    storing: tuple[Optimization, ...],
    float8: Optimization | None,
) -> tuple[tuple[Component, ...], Models]:
    try:
        components = components_of(task, folder, files)
    except BadCheckpoint:
        if not remote:
            raise
        components = components_of(task, None)
    return tuple(components), models_of(components, storing, float8=float8)


def _beside(plan: Plan, components: Iterable[Component], storing: Iterable[Optimization]) -> Beside:
    """What LoRAs keep beside an expert, of several beside the one with most."""
    found = [plan.get(LoRA).beside(component, storing) for component in components if component.is_expert]
    return max(found, key=lambda each: each.host)


def video_of(wanted: Wanted, plan: Plan) -> Video:
    """What a job costs, by its recipe where there is one.

    Of a video that is made clip by clip a clip, beside two latent frames of what came before.
    """
    config, arguments = wanted.config, wanted.arguments
    clip = arguments.get("infer_frames") or arguments.get("clip_len")
    extended = None if wanted.inputs is None else wanted.inputs.beyond.get("extend")
    side, patch = config.vae_stride[1], config.patch_size[1]
    frame = (wanted.width // side // patch) * (wanted.height // side // patch)
    scales = wanted.guide_scale if isinstance(wanted.guide_scale, tuple) else (wanted.guide_scale,)
    video = Video(
        width=wanted.width, height=wanted.height, frames=clip or extended or wanted.num_frames, steps=wanted.steps,
        forwards=1 if set(scales) == {1} else 2, encodes=wanted.inputs is not None and bool(wanted.inputs.files),
        more_tokens=2 * frame if clip else 0, window=plan.get(ContextWindows).context_frames,
        overlap=plan.get(ContextWindows).context_overlap,
    )  # fmt: skip
    if not (few := plan.get(FewStep)).enabled:
        return video
    recipe = few.recipe
    forwards = 2 if recipe.guided_steps else 1
    return replace(video, steps=recipe.steps, forwards=forwards, guided=recipe.guided_steps)
