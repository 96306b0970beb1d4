"""LoRAs as they are asked for: FILE[:STRENGTH[@FROM-TO]], and how strong that is in a step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from wan.engine.errors import BadRequest
from wan.engine.sampling.schedule import span
from wan.engine.types import Step

LORA_FLAGS = ("lora", "lora_high", "lora_low")
"""The options that name LoRAs: for all experts, or for one."""
_SPELLED = re.compile(r"(?P<path>.+):(?P<strength>[^:@/\\]+)(?:@(?P<span>[^:@/\\]+))?")


@dataclass(frozen=True)
class Given:
    """A LoRA as it was asked for: its file, how strong, and in which share of the steps.

    `number` is its place among those that change an expert.
    """

    path: Path
    strength: float = 1.0
    first: float = 0.0
    last: float = 1.0
    number: int = 0

    @property
    def whole(self) -> bool:
        """Whether it acts in every step."""
        return (self.first, self.last) == (0.0, 1.0)

    def at(self, step: Step) -> float:
        """Its strength in a step."""
        acts = self.whole or self.first <= step.index / step.count < self.last
        return self.strength * step.lora_factor(self.number) if acts else 0.0

    def __str__(self) -> str:
        steps = "" if self.whole else f"@{self.first:g}-{self.last:g}"
        return f"{self.path.absolute()}:{self.strength:g}{steps}"


def parsed(text: str, flag: str) -> Given:
    """FILE, FILE:STRENGTH or FILE:STRENGTH@FROM-TO, read from the right: a file's name may hold colons itself."""
    if Path(text).expanduser().is_file():
        return Given(Path(text).expanduser())
    match = _SPELLED.fullmatch(text)
    if match is None:
        return Given(Path(text).expanduser())
    try:
        strength = float(match["strength"])
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise BadRequest(f"{flag} {text!r}: {match['strength']!r} is no number; write FILE, FILE:0.8 or FILE:0.8@0-0.5")
    first, last = span(f"{flag} {text!r}:", match["span"]) if match["span"] is not None else (0.0, 1.0)
    return Given(Path(match["path"]).expanduser(), strength, first, last)
