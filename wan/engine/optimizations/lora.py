"""LoRAs, merged into the transformer's weights while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.weights.lora import LoRAFile, merged, open_lora

EXPERTS = ("dit", "high", "low")


@dataclass(frozen=True, kw_only=True)
class LoRA(Optimization):
    """Add LoRAs to the transformer's weights: a style, a character, Animate's relighting.

    Each layer is merged in float32 when it is read, so a step costs what it cost before and there is never a second
    copy of the weights. Of two experts both are changed. Files in the usual dialects (PEFT, diffusers, kohya) are read;
    one that is made for another model is refused before weights are. Source: Hu et al. 2021, arXiv:2106.09685.
    """

    order = Order.MERGE
    grade = "lossy"
    tolerance = 0.05
    lora: str | None = option(None, "LoRA files to merge, comma separated; FILE@0.8 sets a strength other than 1")

    @property
    def enabled(self) -> bool:
        return bool(self.lora)

    def check(self, hardware: Hardware) -> None:
        self._files()

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
        if name in EXPERTS:
            for lora, _ in self._files():
                lora.check(shapes)

    def transform(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Iterable[tuple[str, Tensor]]:
        return merged(weights, self._files()) if name in EXPERTS else weights

    @property
    def paths(self) -> list[Path]:
        """Where the files are."""
        return [path for path, _ in self._given()]

    def absolute(self) -> str:
        """The option, spelled so that it means the same in any folder."""
        return ",".join(f"{path.absolute()}@{strength:g}" for path, strength in self._given())

    def _files(self) -> list[tuple[LoRAFile, float]]:
        return [(open_lora(path), strength) for path, strength in self._given()]

    def _given(self) -> list[tuple[Path, float]]:
        return [_parsed(text.strip()) for text in (self.lora or "").split(",") if text.strip()]


def _parsed(text: str) -> tuple[Path, float]:
    path, at, strength = text.rpartition("@")
    if not at or Path(text).expanduser().is_file():
        return Path(text).expanduser(), 1.0
    try:
        return Path(path).expanduser(), float(strength)
    except ValueError as error:
        raise BadRequest(f"--lora {text!r}: {strength!r} is no number; write FILE or FILE@0.8") from error
