"""What a layer makes of a text, kept between steps: it changes only where a LoRA beside the weights changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from wan.engine.engine import Engine

Pair = tuple[Tensor, Tensor]


class Kept:
    """What a layer makes of texts, each kept while the text lives and `strengths` tell the same."""

    def __init__(self, strengths: Callable[[], tuple[float, ...]]) -> None:
        self._strengths = strengths
        self._last = strengths()
        self._pairs = WeakTensorKeyDictionary()

    def __call__(self, make: Callable[[Tensor], Pair], text: Tensor) -> Pair:
        if (now := self._strengths()) != self._last:
            self._last = now
            self._pairs.clear()
        if text not in self._pairs:
            self._pairs[text] = make(text)
        pair: Pair = self._pairs[text]
        return pair


def strengths_of(engine: Engine, dit: nn.Module) -> Callable[[], tuple[float, ...]]:
    """Tells how strongly the LoRAs beside a network's weights act now."""
    adapted = next((each for each in engine.adapted.values() if each.module is dit), None)
    return lambda: () if adapted is None else adapted.strengths
