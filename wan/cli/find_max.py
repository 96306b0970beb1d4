"""`--find_max frames|size`: the longest video, or the largest size, that fits; nothing is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from wan.cli.budget import budget_of, planner_of, video_of
from wan.cli.generate import machine
from wan.cli.presets import plan_and_preset
from wan.cli.request import resolve
from wan.conditioning.geometry import parse_size
from wan.configs import SUPPORTED_SIZES
from wan.engine.budget import describe_budget
from wan.engine.errors import BadRequest
from wan.engine.prediction import Video
from wan.engine.types import Family
from wan.families import family_of

if TYPE_CHECKING:
    from wan.cli.report import Terminal
    from wan.cli.request import Wanted
    from wan.engine.budget import Planner
    from wan.engine.plan import Optimization

MOST_GROUPS = 1000
"""Latent frames it looks for at most."""


def find_max(args: argparse.Namespace, registry: Sequence[type[Optimization]], terminal: Terminal, preset: str) -> str:
    """The answer; what it rests on is said on the terminal. Raises IncompatibleOptions if nothing fits."""
    if args.ckpt_dir is None and args.dit is None and args.load_format is None:
        args.load_format = "dummy"
    wanted, hardware = resolve(args, inputs=False), machine(args, registry)
    plan, taken = plan_and_preset(args, registry, hardware, preset)
    budget = budget_of(args, hardware, preset, taken.reserve_vram if taken else None)
    assert budget is not None, "--find_max asks for one"

    def planner(video: Video) -> Planner:
        return planner_of(args, wanted, plan, registry, hardware, budget, video)

    asked = video_of(wanted, plan)
    answer, video = (_longest if args.find_max == "frames" else _largest)(wanted, asked, budget.size, planner)
    for line in describe_budget(planner(video).choose(budget.size)):
        terminal.line(line)
    return answer


def _longest(wanted: Wanted, video: Video, budget: int, planner: Callable[[Video], Planner]) -> tuple[str, Video]:
    """The most frames at the size that is wanted."""
    time = wanted.config.vae_stride[0]
    usual = next(field.default for field in fields(Family) if field.name == "shot_frames")
    if family_of(wanted.task).shot_frames is not usual:
        raise BadRequest(
            f"--find_max frames: {wanted.task} makes a video clip by clip, so its length needs no more memory; "
            "--find_max size says how large it can be"
        )
    low, high = 0, MOST_GROUPS + 1  # the first fits or nothing does, the last is beyond what is looked for
    while high - low > 1:
        middle = (low + high) // 2
        fits = planner(replace(video, frames=time * middle + 1)).fits(budget)
        low, high = (middle, high) if fits else (low, middle)
    return str(time * low + 1), replace(video, frames=time * low + 1)


def _largest(wanted: Wanted, video: Video, budget: int, planner: Callable[[Video], Planner]) -> tuple[str, Video]:
    """The largest size the task was trained on, at the frames that are wanted; else the smallest, which is refused."""
    sizes = sorted(
        map(parse_size, SUPPORTED_SIZES[wanted.task]), key=lambda size: (size[0] * size[1], size), reverse=True
    )
    videos = [replace(video, width=width, height=height) for width, height in sizes]
    video = next((video for video in videos if planner(video).fits(budget)), videos[-1])
    return f"{video.width}*{video.height}", video
