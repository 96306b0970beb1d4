"""Videos longer than a model was trained for, window by window."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Optimization, Order, Plan
from wan.engine.sampling.windows import Mean, Window, of_window, shuffled_noise, weights, windows
from wan.engine.types import Condition, Denoiser, Denoising, Request, Segment, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine

STRIDE = 4
"""Frames of the video to one latent frame, in every VAE of the models."""


@dataclass(frozen=True, kw_only=True)
class ContextWindows(Optimization):
    """Denoise a long video in overlapping windows, so that the model sees no more frames than it was trained on.

    Memory and time of a forward are the window's, whatever the length. Every step joins the windows by weighted means;
    a given first frame or reference is shown to each. A prompt may change over the video: parts between `|` are
    spread over it evenly. A video no longer than one window is made as without. With a step cache use `static`
    windows, which stay where they are.
    """

    order = Order.WINDOWS
    grade = "lossy"
    tolerance = 2.0
    cost = "what windows share is computed twice"
    per_call = True
    context_frames: int = option(0, "frames of the video the model sees at once, 4n+1; 81 for the published models")
    context_overlap: int = option(16, "frames that neighbouring windows share")
    context_schedule: Literal["uniform", "looped", "static"] = option(
        "uniform", "windows that move from step to step, go round the end as well, or stay"
    )
    context_fuse: Literal["linear", "pyramid"] = option("linear", "how windows are weighed where they meet")
    freenoise: bool = option(True, "begin every window from the same noise in another order (FreeNoise)")

    def check(self, hardware: Hardware) -> None:
        if self.context_frames < 5 or self.context_frames % STRIDE != 1:
            raise BadRequest(f"--context_frames {self.context_frames!r}: give 4n+1 frames, 5 or more; 81 is usual")
        most = self.context_frames - STRIDE - 1
        if not 0 <= self.context_overlap <= most:
            raise BadRequest(
                f"--context_overlap {self.context_overlap!r}: give 0 to {most} with --context_frames "
                f"{self.context_frames}; 16 is usual"
            )

    def check_plan(self, plan: Plan) -> None:
        cache = plan.values().get("cache", "off")
        if cache != "off" and self.context_schedule != "static":
            logging.getLogger(__name__).info(
                "--cache %s finds few windows again, as those of --context_schedule %s move: use static", cache,
                self.context_schedule,
            )  # fmt: skip

    @property
    def size(self) -> int:
        """Latent frames of a window."""
        return (self.context_frames - 1) // STRIDE + 1

    @property
    def overlap(self) -> int:
        """Latent frames that neighbours share."""
        return self.context_overlap // STRIDE

    def apply(self, engine: Engine) -> None:
        view = _View(self)
        engine.split_prompts(lambda prompt: [part.strip() for part in prompt.split("|")])
        engine.wrap_segment(view.of)
        engine.wrap_denoiser(view.wrap)
        if self.freenoise:
            engine.change_noise(self._noise)

    def _noise(self, noise: Tensor, request: Request) -> Tensor:
        return shuffled_noise(noise, self.size, self.overlap, request.seed) if noise.shape[2] > self.size else noise


@dataclass
class _View:
    """The denoiser of one segment through windows."""

    options: ContextWindows
    run: Denoising | None = None
    _inner: Denoiser | None = None
    _conditions: dict[tuple[int, str, Window], Condition] = field(default_factory=dict)
    """Those of the last step; windows that stay where they are find theirs again."""

    @contextmanager
    def of(self, dit: nn.Module, run: Denoising) -> Iterator[None]:
        self.run = run
        try:
            yield
        finally:
            self.run, self._inner, self._conditions = None, None, {}

    def wrap(self, inner: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
        self._inner = inner
        return self

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        assert self.run is not None and self._inner is not None
        scenes = self.run.scenes or (self.run.branches,)
        count = latents.shape[2]
        if count <= self.options.size and len(scenes) == 1:
            return self._inner(latents, step, branches)
        joined = {name: Mean(latents) for name in branches}
        kept: dict[tuple[int, str, Window], Condition] = {}
        for window, share in self._windows(count, step):
            scene = of_window(scenes, window, count)
            for name in branches:
                key = scene, name, window
                kept[key] = self._conditions.get(key) or scenes[scene][name].window(window)
            shown = {name: kept[scene, name, window] for name in branches}
            frame_t = step.frame_t and tuple(step.frame_t[frame] for frame in window)
            part = dataclasses.replace(step, window=window, frame_t=frame_t)
            seen = latents.index_select(2, torch.tensor(window, device=latents.device))
            for name, velocity in self._inner(seen, part, shown).items():
                joined[name].add(window, velocity, share)
                shown[name].share_memo(scenes[scene][name])
        self._conditions = kept
        return {name: mean.value() for name, mean in joined.items()}

    def _windows(self, count: int, step: Step) -> Iterator[tuple[Window, list[float]]]:
        """The windows of a step, frames that all of them see first, and how much each of their frames counts."""
        assert self.run is not None
        o, anchor = self.options, self.run.shot.anchor
        size = o.size - anchor
        if size < 2:
            raise BadRequest(
                f"--context_frames {o.context_frames!r} are too few: {anchor} latent frames of each window are given "
                f"ones; give at least {STRIDE * (anchor + 1) + 1}"
            )
        overlap = min(o.overlap, size - 1)
        for window in windows(o.context_schedule, count - anchor, size, overlap, step.index):
            share = weights(window, count - anchor, overlap, o.context_fuse)
            yield (*range(anchor), *(anchor + frame for frame in window)), [1.0] * anchor + share
