"""The cards that presets are written for, and which of them a machine is nearest to.

What a card has and can do stands in the table of `wan.engine.roofline`; here is how drivers call it and what it needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wan.engine import roofline
from wan.engine.hardware import Hardware

SHEETS = {sheet.name: sheet for sheet in roofline.CARDS}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A preset, the row of the roofline's table it is written for, and the words that drivers name such cards with."""

    preset: str
    sheet: str
    words: tuple[str, ...]
    sm: tuple[int, int]

    @property
    def memory(self) -> int:
        return SHEETS[self.sheet].memory

    def named(self, hardware: Hardware) -> bool:
        """Whether `hardware` is this card: by name, and by memory where a part of it or a sister has the same name."""
        has_name = any(re.search(rf"\b{word}\b", hardware.name) for word in self.words)
        return has_name and self.sm == hardware.sm and 0.95 * self.memory <= hardware.total_memory

    def within(self, hardware: Hardware) -> bool:
        """Whether a plan for this card can run on `hardware`: nothing newer is needed, and no more memory.

        A tenth less does, as a desktop uses some of it.
        """
        return self.sm <= hardware.sm and 0.9 * self.memory <= hardware.free_memory


# Of cards with the same memory and capability the first is the nearest.
CARDS = (
    Card(preset="h200", sheet="H200", words=("H200", "GH200"), sm=(9, 0)),
    Card(preset="h100", sheet="H100", words=("H100", "H800", "GH200"), sm=(9, 0)),
    Card(preset="a100_80gb", sheet="A100 80GB", words=("A100", "A800"), sm=(8, 0)),
    Card(preset="a100_40gb", sheet="A100 40GB", words=("A100", "A800"), sm=(8, 0)),
    Card(preset="l40s", sheet="L40S", words=("L40S", "L40", "RTX 6000 Ada"), sm=(8, 9)),
    Card(preset="a6000", sheet="A6000", words=("A6000", "A40"), sm=(8, 6)),
    Card(preset="rtx5090", sheet="RTX 5090", words=("RTX 5090",), sm=(12, 0)),
    Card(preset="rtx4090", sheet="RTX 4090", words=("RTX 4090",), sm=(8, 9)),
    Card(preset="l4", sheet="L4", words=("L4",), sm=(8, 9)),
    Card(preset="rtx3090", sheet="RTX 3090", words=("RTX 3090",), sm=(8, 6)),
    Card(preset="rtx3060_12gb", sheet="RTX 3060", words=("RTX 3060",), sm=(8, 6)),
)

NO_CARD = "cpu"
UNKNOWN = "auto"


def nearest(hardware: Hardware) -> tuple[str, str]:
    """The preset for `hardware`, and one clause on why it is that one."""
    if not hardware.is_cuda:
        return NO_CARD, "there is no CUDA card"
    named = next((card for card in CARDS if card.named(hardware)), None)
    if named is not None:
        return named.preset, "written for this card"
    fitting = [card for card in CARDS if card.within(hardware)]
    if not fitting:
        return UNKNOWN, f"no preset is written for a card as small or as old as {hardware}"
    # Memory decides which models fit, so it comes before the generation; `max` takes the first of equals.
    best = max(fitting, key=lambda card: (card.memory, card.sm))
    return best.preset, f"the nearest to {hardware} by free memory and compute capability, which has none of its own"
