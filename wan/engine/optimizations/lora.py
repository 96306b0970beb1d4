"""LoRAs: merged into the transformer's weights while they are read, or kept beside them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wan.engine.accounting import Trunk
from wan.engine.adapting import Adapted, Counts
from wan.engine.beside import beside_of
from wan.engine.engine import on_meta
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.given_loras import LORA_FLAGS, Given, parsed
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.placement import Policy
from wan.engine.plan import Optimization, Order, Plan
from wan.engine.prediction import Beside
from wan.engine.types import EXPERTS, Component, Condition, Denoiser, Segment, Step
from wan.engine.weights.lora import LoRAFile, merged, open_lora

if TYPE_CHECKING:
    from wan.engine.engine import Engine

AT_RUN_TIME = ("onthefly", "stream")


@dataclass(frozen=True, kw_only=True)
class LoRA(Optimization):
    """Change the transformer by LoRA files: a style, a character, fewer steps, Animate's relighting.

    `merge` adds them to the weights while these are read, in float32: a step costs what it cost before. `onthefly`
    keeps their thin matrices beside the weights, which stay the checkpoint's: strengths may change by the step, files
    by the video of a queue, and quantised weights are not quantised again; a step computes a little more. `stream`
    merges the weights of a block for the time of its call: for LoRAs of very high rank. `auto` is merge, or onthefly
    where a LoRA acts in part of the steps. Files in every usual dialect are read; one made for another model is
    refused before weights are. docs/lora.md. Source: Hu et al. 2021, arXiv:2106.09685.
    """

    order = Order.MERGE
    grade = "lossy"
    tolerance = 0.05
    cost = "merged: nothing a step; beside the weights: time a step, and the pairs' memory"
    per_call = True
    lora: tuple[str, ...] = option((), "LoRA files, each FILE[:STRENGTH[@FROM-TO]]: 1 unless said, in a share of steps")
    lora_high: tuple[str, ...] = option((), "the same for the high-noise expert alone")
    lora_low: tuple[str, ...] = option((), "the same for the low-noise expert alone")
    lora_mode: Literal["auto", "merge", "onthefly", "stream"] = option(
        "auto", "added to the weights at loading, beside them at run time, or merged block by block"
    )
    lora_timing: bool = option(False, "tell what LoRAs cost: reading, merging, copying, and the seconds of a step")

    @property
    def enabled(self) -> bool:
        return bool(self.lora or self.lora_high or self.lora_low) or self.lora_mode in AT_RUN_TIME

    @property
    def mode(self) -> str:
        """What is done, where it was left open."""
        if self.lora_mode != "auto":
            return self.lora_mode
        return "onthefly" if any(not given.whole or open_lora(given.path).behind for given in self._all()) else "merge"

    def check(self, hardware: Hardware) -> None:
        for given in self._all():
            if open_lora(given.path).behind and self.mode != "onthefly":
                raise IncompatibleOptions(
                    f"--lora_mode {self.mode} and {str(given)!r} do not go together: it acts on some tokens alone; use "
                    "--lora_mode onthefly"
                )
            if not given.whole and self.mode == "merge":
                raise IncompatibleOptions(
                    f"--lora_mode merge and {str(given)!r} do not go together: what is merged acts in every step; use "
                    "--lora_mode onthefly"
                )

    def follows(self, before: Optimization) -> bool:
        assert isinstance(before, LoRA)
        return before.mode in AT_RUN_TIME and self.lora_mode in ("auto", before.mode)

    def check_plan(self, plan: Plan) -> None:
        rows = plan.values().get("attention_rows")
        for given in self._all() if rows else ():
            if open_lora(given.path).behind:
                raise IncompatibleOptions(
                    f"--attention_rows {rows} and --lora {str(given)!r} do not go together: it acts on some tokens "
                    "alone, which it must see all at once; drop --attention_rows"
                )

    def check_component(self, component: Component) -> None:
        behind = [lora for lora, _ in self._files(component.name) if lora.behind] if component.is_expert else []
        if behind and not any(adapter.appends for adapter in component.build().adapters.children()):  # type: ignore[union-attr]
            raise BadRequest(
                f"LoRA {str(behind[0].path)!r} acts on tokens behind those of the video alone, and {component.name!r} "
                "has none: it was made for a model that looks at a reference that way"
            )

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
        if name not in EXPERTS:
            return
        if name == "dit" and (self.lora_high or self.lora_low):
            flag = "--lora_high" if self.lora_high else "--lora_low"
            raise BadRequest(f"{flag}: this model has one expert; use --lora")
        for lora, given in self._files(name):
            lora.check(shapes)
            logging.getLogger(__name__).info(
                "LoRA %s -> %s: %s, strength %g", given.path.name, name, lora.counts(), given.strength
            )

    def beside(self, component: Component, active: Iterable[Optimization] = ()) -> Beside:
        """What its files keep beside an expert whose weights are stored as `active` has it. Reads headers."""
        files = [lora for lora, _ in self._files(component.name)]
        if not files or self.mode not in AT_RUN_TIME:
            return Beside()
        return beside_of(on_meta(component, active), files, dense=self.mode == "stream")

    def transform(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Iterable[tuple[str, Tensor]]:
        files = self._files(name) if name in EXPERTS else []
        if not files or self.mode in AT_RUN_TIME:
            return weights
        return merged(weights, [(lora, given.strength) for lora, given in files], partial(self._tell_merged, name))

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name in engine.expert_names and self.mode in AT_RUN_TIME:
            engine.adapted[name] = Adapted(module, engine.device, dense=self.mode == "stream")

    def apply(self, engine: Engine) -> None:
        spent: dict[str, list[float]] = {}

        def wrap(denoiser: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
            if (adapted := engine.adapted.get(segment.expert)) is not None:
                denoiser = _Changing(denoiser, adapted, self._files(segment.expert))
            return _timed(denoiser, spent, engine.device) if self.lora_timing else denoiser

        engine.wrap_denoiser(wrap, outermost=True)
        engine.wrap_segment(lambda dit, denoising: _leaving(dit, engine))
        if not all(given.whole for given in self._all()):
            engine.wrap_trunk(lambda trunk, dit, segment: _refusing_windows(trunk, engine.adapted[segment.expert]))
        if self.lora_timing:
            engine.during_run(lambda: _told(spent, engine))

    @property
    def named(self) -> list[tuple[str, Path]]:
        """The flag that names each file, and where it is."""
        return [(name, given.path) for name in LORA_FLAGS for given in self._given(name)]

    @property
    def paths(self) -> list[Path]:
        """Where the files are."""
        return [path for _, path in self.named]

    def absolute(self) -> dict[str, list[str]]:
        """The options that name files, spelled so that they mean the same in any folder."""
        named = {"lora": self.lora, "lora_high": self.lora_high, "lora_low": self.lora_low}
        return {name: [str(parsed(text, f"--{name}")) for text in texts] for name, texts in named.items()}

    def _files(self, name: str) -> list[tuple[LoRAFile, Given]]:
        """What changes one expert."""
        found = [(open_lora(given.path), given) for given in self._given("lora")]
        mine = [(lora.for_expert(name), given) for lora, given in found]
        if name in ("high", "low"):
            mine += [(open_lora(given.path), given) for given in self._given(f"lora_{name}")]
        return [(lora, replace(given, number=i)) for i, (lora, given) in enumerate(mine) if lora.targets]

    def _given(self, option_name: str) -> list[Given]:
        return [parsed(text, f"--{option_name}") for text in getattr(self, option_name)]

    def _all(self) -> list[Given]:
        return [given for name in LORA_FLAGS for given in self._given(name)]

    def _tell_merged(self, name: str, tensors: int, seconds: float) -> None:
        if self.lora_timing:
            logging.getLogger(__name__).info(
                "LoRA timing: %s, %d tensors read and merged in %.2f s", name, tensors, seconds
            )


class _Changing:
    """Has an expert's LoRAs at the strengths of each step. Once a step, whatever computes its branches and windows."""

    def __init__(self, inner: Denoiser, adapted: Adapted, files: Sequence[tuple[LoRAFile, Given]]) -> None:
        self._inner = inner
        self._adapted = adapted
        self._given = [given for _, given in files]
        self._branches: dict[tuple[float, ...], dict[str, tuple[Condition, Condition]]] = {}
        with torch.inference_mode(False), torch.no_grad():
            adapted.load([lora for lora, _ in files])

    def __call__(self, latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        strengths = tuple(given.at(step) for given in self._given)
        with self._adapted.at(strengths):
            stays = all(given.whole for given in self._given) and not step.lora
            return self._inner(latents, step, branches if stays else self._own(strengths, branches))

    def _own(self, strengths: tuple[float, ...], branches: Mapping[str, Condition]) -> Mapping[str, Condition]:
        """The branches, with memories of their own where what embeds the text changes in the middle of a video."""
        if not self._adapted.changes_outside_blocks:
            return branches
        kept = self._branches.setdefault(strengths, {})
        for name, branch in branches.items():
            if name not in kept or kept[name][0] is not branch:
                kept[name] = branch, replace(branch, memo={})
        return {name: kept[name][1] for name in branches}


def _refusing_windows(trunk: Trunk, adapted: Adapted) -> Trunk:
    """`trunk`, refusing windows where they would remember a text's embedding that changes in the middle of a video."""

    def run(tokens: Tensor, inputs: Any, condition: Condition, step: Step) -> Tensor:
        if step.window and adapted.changes_outside_blocks:
            raise IncompatibleOptions(
                "--context_frames and a LoRA with @FROM-TO that changes what embeds the text do not go together: "
                "windows remember the embedding; leave out @FROM-TO"
            )
        return trunk(tokens, inputs, condition, step)

    return run


def _timed(inner: Denoiser, spent: dict[str, list[float]], device: torch.device) -> Denoiser:
    """`inner`, noting the seconds of each step by expert; waits for the device, which is what timing costs."""

    def run(latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
        _wait(device)
        started = time.perf_counter()
        found = inner(latents, step, branches)
        _wait(device)
        spent.setdefault(step.expert, []).append(time.perf_counter() - started)
        return found

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _leaving(dit: nn.Module, engine: Engine) -> Iterator[None]:
    """A network that leaves the device between its segments takes along what was beside it."""
    try:
        yield
    finally:
        for name, adapted in engine.adapted.items():
            if adapted.module is dit and engine.placement.policy(name) is not Policy.RESIDENT:
                adapted.leave()


@contextmanager
def _told(spent: Mapping[str, list[float]], engine: Engine) -> Iterator[None]:
    """The table of `--lora_timing`, when a run is over."""
    yield
    tell = logging.getLogger(__name__).info
    tell("LoRA timing: expert   read s  tensors  found on device  copied MiB  steps  s/step")
    for name, steps in spent.items():
        counts = engine.adapted[name].counts if name in engine.adapted else Counts()
        calls = counts.hits + counts.misses
        found = f"{counts.hits}/{calls}" if calls else "-"
        tell("LoRA timing: %-6s %8.2f %8d %16s %11.1f %6d %7.3f", name, counts.read_seconds, counts.tensors_read,
             found, counts.copied_bytes / 2**20, len(steps), sum(steps) / len(steps))  # fmt: skip
