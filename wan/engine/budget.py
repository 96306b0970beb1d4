"""The fastest way to run that fits into a card's memory, chosen among what the options offer.

Pure: sizes in, option values with a reason each out. A larger budget only adds choices, so it is never predicted
slower. What the user pinned is kept, and nothing that changes the picture is chosen unless it is allowed; decoding in
tiles, whose difference is invisible, is taken where whole frames do not fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wan.engine.errors import IncompatibleOptions
from wan.engine.prediction import PLAIN, Models, Prediction, Predictor, Video
from wan.engine.roofline import GB, Card, forward_seconds

TILES = (64, 48, 32, 24, 16)
STEP = GB // 10
"""Budgets are told in these."""
MARGIN_BYTES = 3 * GB // 10
"""What is left to other processes, beside what they use, where nothing else is said."""
LOSSY = 1.05
"""What keeps weights in 8 bits is chosen where all else takes that much longer, or does not fit."""
FEWEST_ROWS = 4096
"""Fewer rows at a time would no longer fill a card."""

SAVERS = (
    "offload_model", "vae_cpu", "t5_cpu", "stream_t5", "block_swap", "ffn_rows", "attention_rows", "vae_tiling",
    "vae_tile_size", "fp8",
)  # fmt: skip
CHOSEN = (*SAVERS, "use_batched_cfg", "lockstep_cfg", "cuda_graphs")
"""The options it chooses; of the others it takes what the plan has."""
_DOING = {
    "text": "encode the text", "encode": "encode the pictures", "denoise": "denoise", "decode": "decode",
}  # fmt: skip


def gigabytes(size: float) -> str:
    """Bytes as 12.3 GB."""
    return f"{size / GB:.1f} GB"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a choice has to keep to: `available` are the options there are, `pinned` those with the user's values.

    `others` are values that only matter to the prediction (compile, ...). `ram` None: not known.
    """

    available: frozenset[str]
    pinned: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    ram: int | None = None


class Planner:
    """Everything that could be chosen for a video, the fastest first."""

    def __init__(self, models: Models, video: Video, card: Card, wishes: Wishes) -> None:
        self.models, self.video, self.card, self.wishes = models, video, card, wishes
        self._predictor = Predictor(models, video, card)
        self.blocks = models.transformer.swappable
        swap = "block_swap" in wishes.available and wishes.pinned.get("block_swap") in (None, "auto")
        self._most = self.blocks if swap else wishes.pinned.get("block_swap", 0)
        fewest = 0 if swap else self._most
        free = [self._predict(values | {"block_swap": fewest}) for values in self._candidates()]
        self._choices = sorted(free, key=self._cost)
        """Each with as few blocks swapped as can be."""

    def choose(self, budget: int) -> Prediction:
        """The fastest way to run within `budget` bytes. Raises IncompatibleOptions naming a budget that would do.

        Among equally fast ones the plainest is taken; one that also fits into RAM goes before all that do not.
        """
        best: Prediction | None = None
        for free in self._choices:
            if best is not None and self._cost(free) >= self._cost(best):
                break  # swapping blocks never makes it faster
            lean = self._lean(free)
            if lean.peak_bytes > budget:
                continue
            found = free if free.peak_bytes <= budget else self._swapped(free, lean, budget)
            if best is None or self._cost(found) < self._cost(best):
                best = found
        if best is None:
            raise self._refusal(budget)
        return replace(best, reasons=self._reasons(best, budget), budget=budget)

    def least(self) -> int:
        """The smallest budget that is enough, a little rounded up."""
        return -(-self._leanest().peak_bytes // STEP) * STEP

    def fits(self, budget: int) -> bool:
        return self.least() <= budget

    def _lean(self, free: Prediction) -> Prediction:
        """The same with as many blocks swapped as can be."""
        return self._predict({**free.values, "block_swap": self._most})

    def _leanest(self) -> Prediction:
        return min(map(self._lean, self._choices), key=lambda lean: lean.peak_bytes)

    def _predict(self, values: Mapping[str, Any]) -> Prediction:
        return self._predictor.predict({**self.wishes.others, **values})

    def _cost(self, found: Prediction) -> tuple[bool, float, int]:
        lacks_ram = self.wishes.ram is not None and found.host_bytes > self.wishes.ram
        changed = sum(found.values[name] != plain for name, plain in PLAIN.items())
        seconds = found.total_seconds * (LOSSY if found.values["fp8"] != PLAIN["fp8"] else 1)
        return lacks_ram, round(seconds, 3), changed

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Every combination but for the number of swapped blocks, which follows from the budget."""
        rows = max(FEWEST_ROWS, -(-self.video.tokens(self.models) // 8))
        ladders: tuple[list[dict[str, Any]], ...] = (
            [{"offload_model": False}, {"offload_model": True}],
            [{"vae_cpu": False}, {"vae_cpu": True}],
            [
                {"t5_cpu": False, "stream_t5": False},
                {"t5_cpu": False, "stream_t5": True},
                {"t5_cpu": True, "stream_t5": False},
            ],
            [
                {"ffn_rows": 0, "attention_rows": 0},
                {"ffn_rows": rows, "attention_rows": 0},
                {"ffn_rows": rows, "attention_rows": rows},
            ],
            [
                {"use_batched_cfg": False, "lockstep_cfg": False},
                {"use_batched_cfg": False, "lockstep_cfg": True},
                {"use_batched_cfg": True, "lockstep_cfg": False},
            ],
            [{"vae_tiling": False}, *({"vae_tiling": True, "vae_tile_size": tile} for tile in TILES)],
            [{"cuda_graphs": False}, *([{"cuda_graphs": True}] if self._few_tokens() else [])],
            [{"fp8": "off"}, *([] if self.models.float8 is None else [{"fp8": "weight"}])],
        )
        for rungs in itertools.product(*map(self._allowed, ladders)):
            yield {name: value for rung in rungs for name, value in rung.items()}

    def _few_tokens(self) -> bool:
        """Whether launching the kernels of compiled blocks takes longer than computing them."""
        net, tokens = self.models.transformer, self.video.tokens(self.models)
        launched, replayed = (
            forward_seconds(net, tokens, self.card, compiled=True, launched=launched) for launched in (True, False)
        )
        return launched > replayed

    def _allowed(self, ladder: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rungs whose options exist, with what the user pinned in place of theirs, each once."""
        available, pinned, rungs = self.wishes.available, self.wishes.pinned, []
        for rung in ladder:
            if all(value == PLAIN[name] or name in available for name, value in rung.items()):
                rung = {name: pinned.get(name, value) for name, value in rung.items()}
                rungs += [rung] if rung not in rungs else []
        return rungs

    def _swapped(self, free: Prediction, lean: Prediction, budget: int) -> Prediction:
        """`free` with the fewest blocks swapped that make it fit; beyond the slots a stage shrinks evenly with each."""
        slots = min(1 + free.values["prefetch_blocks"], self.blocks)
        start = self._predict({**free.values, "block_swap": slots})
        count = slots
        for phase, parts in start.phases.items():
            before, after = sum(parts.values()), sum(lean.phases[phase].values())
            if before > budget:
                # A little less a block, for bytes that are rounded down.
                a_block = (before - after) / (self.blocks - slots) - 1
                count = max(count, slots + math.ceil((before - budget) / a_block))
        return self._predict({**free.values, "block_swap": min(count, self.blocks)})

    def _reasons(self, found: Prediction, budget: int) -> dict[str, str]:
        """Why each option that is chosen has its value: what would be without it."""
        reasons = {}
        for name in [each for each in CHOSEN if each in self.wishes.available and each not in self.wishes.pinned]:
            if found.values[name] == PLAIN[name]:
                reasons[name] = "there is room" if name in SAVERS else "nothing gained"
                continue
            without = self._predict({**found.values, name: PLAIN[name]})
            if without.peak_bytes > budget:
                reasons[name] = f"else {gigabytes(without.peak_bytes)} to {_DOING[without.peak_phase]}"
            else:
                gained = without.total_seconds - found.total_seconds
                reasons[name] = f"{gained:.{1 if gained >= 0.1 else 3}f} s faster a video"
        return reasons

    def _refusal(self, budget: int) -> IncompatibleOptions:
        lean = self._leanest()
        kept = ", ".join(f"--{name} {value}" for name, value in self.wishes.pinned.items())
        return IncompatibleOptions(
            f"{gigabytes(budget)} of GPU memory are too little for {self.video.width}x{self.video.height}, "
            f"{self.video.frames} frames{f' with {kept}' if kept else ''}: it takes {gigabytes(self.least())} "
            f"(to {_DOING[lean.peak_phase]}). Give --vram_budget {self.least() / GB:.1f}GB, a smaller --size or fewer "
            "--frame_num; --find_max frames says how many fit"
        )


def _lasting(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 600 else f"{minutes} min" if minutes < 180 else f"{seconds / 3600:.1f} h"


def describe_budget(found: Prediction) -> list[str]:
    """What is predicted, in lines for people: bytes of each stage, pace, and whether copies hide."""
    limit = "" if found.budget is None else f" of {gigabytes(found.budget)}"
    lines = [f"memory  at most {gigabytes(found.peak_bytes)}{limit}, computed for {found.card.name} (not measured)"]
    for phase, parts in found.phases.items():
        shares = " + ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
        lines.append(f"        {phase:8}{gigabytes(sum(parts.values()))} = {shares}")
    pace = f"{found.seconds_per_step:.2f} s/step, {_lasting(found.total_seconds)} a video"
    pace += ", every step computed" if found.values["cache"] != "off" else ""
    lines.append(f"pace    {pace}, computed from {found.card.source}; {gigabytes(found.host_bytes)} of RAM for weights")
    if found.copies_hide is not None:
        needs = f"{found.copy_rate_needed / GB:.1f} of {found.card.copy_rate / GB:.0f} GB/s needed"
        hidden = "hide behind computing" if found.copies_hide else "do not hide behind computing"
        lines.append(f"copies  of swapped blocks {hidden}: {needs}")
    return lines
