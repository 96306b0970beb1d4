"""Weights in 8 bits: the linear layers of the transformer's blocks, and those of the text encoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from wan.engine.errors import BadRequest, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.ops.float8 import Float8Linear, scaled_refusal
from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.types import EXPERTS, Component

ENCODER = "text_encoder"


@dataclass(frozen=True, kw_only=True)
class FP8(Optimization):
    """Keep the linear layers of the transformer's blocks in 8 bits (e4m3, a scale for each output): half the memory.

    "weight" makes each layer's weight anew in the dtype of its input, on any card and on the CPU. "scaled" quantises
    the inputs too, row by row, and multiplies in 8 bits: Ada, Hopper and newer; a CPU computes the same numbers slowly.
    All outside the blocks, and norms, modulation and biases within, keep their dtype, and so does what `fp8_keep`
    names. Weights are quantised one by one while they are read, LoRAs merged before; files that are in 8 bits already
    are held as they are. Source: Micikevicius et al. 2022, arXiv:2209.05433; docs/fp8.md.
    """

    order = Order.QUANTIZE
    grade = "lossy"
    tolerance = 0.2
    cost = "a scale and a conversion for each product"
    fp8: Literal["off", "weight", "scaled", "auto"] = option(
        "off", "keep the blocks' weights in 8 bits, or multiply in 8 bits; auto: the first where a memory budget gains"
    )
    fp8_keep: str | None = option(None, "layers of the blocks to keep: names or patterns, as blocks.0.*,*.ffn.2")

    @property
    def enabled(self) -> bool:
        return self.fp8 in ("weight", "scaled")

    @property
    def allowed(self) -> bool:
        """Whether a memory budget may choose it."""
        return self.fp8 == "auto"

    def in_8_bits(self) -> FP8 | None:
        """What it is, or would be where a memory budget chooses it; None where it may not."""
        return replace(self, fp8="weight") if self.allowed else self if self.enabled else None

    def check(self, hardware: Hardware) -> None:
        if self.fp8 != "scaled" or not hardware.is_cuda:
            return
        if hardware.sm < (8, 9):
            raise UnsupportedHardware(
                f"--fp8 scaled needs sm_89 or newer (Ada, Hopper, Blackwell), this is {hardware}. Use --fp8 weight."
            )
        if torch.cuda.is_available() and (refusal := scaled_refusal(hardware.device)) is not None:
            raise UnsupportedHardware(
                f"--fp8 scaled: PyTorch {torch.__version__} cannot multiply scaled rows on {hardware} ({refusal}). "
                "Use --fp8 weight, or a newer PyTorch."
            )

    def check_component(self, component: Component) -> None:
        if component.is_expert and self.fp8_keep:
            names = [name for name, _ in _linears(component.build())]
            for pattern in self._kept():
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise BadRequest(
                        f"--fp8_keep {pattern!r} names no linear layer of the blocks of {component.name!r}; they are "
                        f"called {names[0]!r} to {names[-1]!r}"
                    )

    def convert(self, module: nn.Module, name: str) -> None:
        if name in EXPERTS:
            kept = self._kept()
            for layer, linear in list(_linears(module)):
                if not any(fnmatchcase(layer, pattern) for pattern in kept):
                    module.set_submodule(layer, Float8Linear(linear, scaled=self.fp8 == "scaled"))

    def _kept(self) -> list[str]:
        return [text.strip() for text in (self.fp8_keep or "").split(",") if text.strip()]


@dataclass(frozen=True, kw_only=True)
class T5FP8(Optimization):
    """Keep the linear layers of the text encoder in 8 bits (e4m3, a scale for each output).

    Each weight is made anew in the encoder's dtype when it is used, on any card and on the CPU; its table of words,
    norms and positions keep their dtype. T5-xxl then takes 6.7 GB in place of 11.4 GB (computed). Files that are in 8
    bits already are held as they are.
    """

    order = Order.QUANTIZE
    grade = "lossy"
    tolerance = 0.05
    cost = "a scale and a conversion for each product"
    t5_fp8: bool = option(False, "keep the text encoder's weights in 8 bits")

    def convert(self, module: nn.Module, name: str) -> None:
        if name == ENCODER:
            for layer, linear in list(_linears(module)):
                module.set_submodule(layer, Float8Linear(linear))


def _linears(module: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """The plain linear layers of a network's blocks, by name."""
    inside = {part for block in module.all_blocks() for part in block.modules()}  # type: ignore[operator]
    for name, part in module.named_modules():
        if type(part) is nn.Linear and part in inside:
            yield name, part
