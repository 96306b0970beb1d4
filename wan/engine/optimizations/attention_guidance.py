"""Guidance inside the transformer: at its blocks and at their attention, not at the velocities it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.kept import Kept, strengths_of
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order
from wan.engine.sampling.schedule import in_span, span
from wan.engine.types import Denoising, Layout, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine

COMPILED = Conflict("Compile", "it changes attention inside the compiled blocks; every video would compile them again")


@dataclass(frozen=True, kw_only=True)
class NAG(Optimization):
    """Push the attention to the prompt away from the attention to the negative prompt.

    Costs one more cross-attention a block, whose keys and values of the negative prompt are computed once and kept, and
    works at guidance scale 1, where distilled models have no other use for a negative prompt. Source: normalized
    attention guidance, arXiv:2505.21179.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 2.0
    cost = "one more cross-attention a block"
    per_call = True
    conflicts = (COMPILED,)
    nag_scale: float = option(0.0, "strength of normalized attention guidance; the authors use 11")
    nag_tau: float = option(2.5, "by how much it may enlarge the attention's output")
    nag_alpha: float = option(0.25, "share of the guided output, 0 to 1")

    def check(self, hardware: Hardware) -> None:
        if self.nag_scale < 0 or not 0 <= self.nag_alpha <= 1 or self.nag_tau <= 0:
            raise BadRequest(
                f"--nag_scale {self.nag_scale!r} --nag_tau {self.nag_tau!r} --nag_alpha {self.nag_alpha!r}: give a "
                "scale of 0 or more, a tau above 0 and an alpha of 0 to 1; 11, 2.5 and 0.25 are usual"
            )

    def apply(self, engine: Engine) -> None:
        engine.wrap_segment(partial(self._guide, engine))

    @contextmanager
    def _guide(self, engine: Engine, dit: nn.Module, run: Denoising) -> Iterator[None]:
        unwanted = run.branches.get("uncond")
        if unwanted is None or "cond" not in run.branches:
            raise BadRequest("--nag_scale needs a prompt and a negative prompt, and this task has no such pair")

        def wrap(layer: Any, attend: Attend, now: _Now) -> Attend:
            kept = Kept(strengths_of(engine, dit))

            def guided(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
                out = attend(q, k, v, layout)
                if "cond" not in now.branches:
                    return out
                rows = branch_rows(now.branches, "cond", q.shape[0])
                negative = unwanted.once(f"text:{now.expert}", lambda: dit.embed_text(unwanted.context))  # type: ignore[operator]
                away = attend(q[rows], *kept(layer.keys_of, negative), layout)
                led = out.clone()
                led[rows] = normalized_guidance(out[rows], away, self.nag_scale, self.nag_tau, self.nag_alpha)
                return led

            return guided

        with _attention(dit, "cross", wrap):
            yield


@dataclass(frozen=True, kw_only=True)
class SkipLayers(Optimization):
    """Leave some blocks out of the unconditional forward, so that guidance leads away from a coarser picture.

    Source: skip-layer guidance, arXiv:2411.18664.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 4.0
    cost = "nothing: it saves blocks"
    per_call = True
    skip_layers: str | None = option(None, "blocks to leave out of the unconditional forward, as 9,10; the usual is 10")
    skip_layers_interval: str = option("0.1-1", "the share of the steps in which they are left out, FROM-TO")

    def check(self, hardware: Hardware) -> None:
        span("--skip_layers_interval", self.skip_layers_interval)
        self._numbers()

    def check_weights(self, shapes: Any, name: str) -> None:
        self._within(len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}))

    def apply(self, engine: Engine) -> None:
        engine.wrap_segment(self._skip)

    def _numbers(self) -> list[int]:
        try:
            return [int(number) for number in (self.skip_layers or "").split(",") if number]
        except ValueError as error:
            raise BadRequest(f"--skip_layers {self.skip_layers!r} is no list of numbers: write 9,10") from error

    def _within(self, count: int) -> list[int]:
        if beyond := [number for number in self._numbers() if not 0 <= number < count]:
            raise BadRequest(f"--skip_layers {self.skip_layers!r}: the blocks are 0 to {count - 1}, not {beyond[0]}")
        return self._numbers()

    @contextmanager
    def _skip(self, dit: nn.Module, run: Denoising) -> Iterator[None]:
        interval = span("--skip_layers_interval", self.skip_layers_interval)
        blocks: Any = dit.blocks
        left_out = {id(blocks[number]) for number in self._within(len(blocks))}
        inner, now = dit.run_block, _Now()

        def run_block(block: nn.Module, tokens: Tensor, inputs: Any) -> Any:
            if id(block) not in left_out or not now.within(interval) or "uncond" not in inputs.branches:
                return inner(block, tokens, inputs)  # type: ignore[operator]
            if inputs.branches == ("uncond",):
                return tokens
            rows = branch_rows(inputs.branches, "uncond", tokens.shape[0])
            kept = tokens[rows].clone()  # a block may write its input
            after = inner(block, tokens, inputs)  # type: ignore[operator]
            after[rows] = kept
            return after

        dit.run_block = run_block  # type: ignore[assignment]
        try:
            with _watched(dit, now):
                yield
        finally:
            dit.run_block = inner


@dataclass(frozen=True, kw_only=True)
class EnhanceVideo(Optimization):
    """Strengthen self-attention by how much the frames of a video attend to each other.

    Source: Enhance-A-Video, arXiv:2502.07508, with tokens taken in their order, frame by frame.
    """

    order = Order.GUIDANCE
    grade = "lossy"
    tolerance = 4.0
    cost = "attention among the frames of every place, once more a block"
    per_call = True
    conflicts = (COMPILED,)
    enhance_video: float = option(0.0, "weight of Enhance-A-Video; the authors use 2 to 4")
    enhance_video_interval: str = option("0-1", "the share of the steps in which it acts, FROM-TO")

    def check(self, hardware: Hardware) -> None:
        span("--enhance_video_interval", self.enhance_video_interval)
        if self.enhance_video < 0:
            raise BadRequest(f"--enhance_video {self.enhance_video!r}: give 0 (off) or more")

    def apply(self, engine: Engine) -> None:
        engine.wrap_segment(self._enhance)

    @contextmanager
    def _enhance(self, dit: nn.Module, run: Denoising) -> Iterator[None]:
        interval = span("--enhance_video_interval", self.enhance_video_interval)

        def wrap(layer: Any, attend: Attend, now: _Now) -> Attend:
            def enhanced(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
                out = attend(q, k, v, layout)
                if layout is None or not now.within(interval):
                    return out
                strength = frame_attention(q, k, layout.grid) * (layout.grid[0] + self.enhance_video)
                return out * strength.clamp(min=1.0).view(-1, 1, 1, 1).to(out.dtype)

            return enhanced

        with _attention(dit, "self", wrap):
            yield


Attend = Callable[..., Tensor]


@dataclass
class _Now:
    """Where the forward that is running stands."""

    step: Step | None = None
    branches: tuple[str, ...] = field(default=("cond",))

    @property
    def expert(self) -> str:
        return "dit" if self.step is None else self.step.expert

    def within(self, interval: tuple[float, float]) -> bool:
        return self.step is not None and in_span(self.step, interval)


def branch_rows(branches: tuple[str, ...], name: str, batch: int) -> slice:
    """The part of the batch that belongs to a guidance branch in it."""
    each = batch // len(branches)
    return slice(branches.index(name) * each, (branches.index(name) + 1) * each)


def normalized_guidance(wanted: Tensor, unwanted: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Attention outputs [B, L, N, D] for the prompt, led away from those for the negative prompt.

    Norms are L1 over all heads of a token. Source: arXiv:2505.21179, eq. 7 to 9.
    """
    guided = scale * wanted - (scale - 1) * unwanted
    norm, limit = (x.abs().sum((-2, -1), keepdim=True) for x in (guided, wanted))
    guided = torch.where(norm > tau * limit, guided * (tau * limit / (norm + 1e-7)), guided)
    return alpha * guided + (1 - alpha) * wanted


def frame_attention(q: Tensor, k: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B] how much, on average, a token attends to those at its place in other frames; 1 / F if to all alike.

    q and k [B, L, N, D] begin with the tokens of the grid, frame by frame. The mean of what lies off the diagonal of
    the F x F attention among the frames, over places and heads. One row of places at a time, which bounds memory.
    """
    frames, rows, columns = grid
    if frames == 1:
        return torch.zeros(q.shape[0], device=q.device)
    places = rows * columns
    q, k = (x[:, : frames * places].unflatten(1, (frames, places)) for x in (q, k))
    total = torch.zeros(q.shape[0], device=q.device)
    for start in range(0, places, columns):
        part = slice(start, start + columns)
        scores = torch.einsum("bfpnd,bgpnd->bpnfg", q[:, :, part].float(), k[:, :, part].float())
        weights = (scores / math.sqrt(q.shape[-1])).softmax(-1)
        total += (weights.sum((-2, -1)) - weights.diagonal(dim1=-2, dim2=-1).sum(-1)).sum((1, 2))
    heads = q.shape[3]
    return total / (places * heads * (frames * frames - frames))


@contextmanager
def _watched(dit: nn.Module, now: _Now) -> Iterator[None]:
    """The trunk tells `now` its step, each block the branches in it: of those in lockstep one at a time."""
    trunk: Any = dit.trunk
    run_block: Any = dit.run_block

    def telling(tokens: Tensor, inputs: Any, condition: Any, step: Step | None) -> Tensor:
        now.step = step
        return trunk(tokens, inputs, condition, step)

    def running(block: nn.Module, tokens: Tensor, inputs: Any) -> Any:
        now.branches = inputs.branches
        return run_block(block, tokens, inputs)

    dit.trunk, dit.run_block = telling, running  # type: ignore[assignment]
    try:
        yield
    finally:
        dit.trunk, dit.run_block = trunk, run_block


@contextmanager
def _attention(dit: nn.Module, role: str, wrap: Callable[[Any, Attend, _Now], Attend]) -> Iterator[None]:
    """Attention of the main blocks in one role, wrapped."""
    now = _Now()
    blocks: Any = dit.blocks
    layers = [part for block in blocks for part in block.modules() if getattr(part, "role", None) == role]
    inner = [layer.attend for layer in layers]
    for layer, attend in zip(layers, inner, strict=True):
        layer.attend = wrap(layer, attend, now)
    try:
        with _watched(dit, now):
            yield
    finally:
        for layer, attend in zip(layers, inner, strict=True):
            layer.attend = attend
