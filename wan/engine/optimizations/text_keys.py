"""Keys and values of texts: the same in every step, computed in every step unless they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from wan.engine.kept import Kept, strengths_of
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order
from wan.engine.types import Denoising

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class TextKeys(Optimization):
    """Keep each block's keys and values of the text (and of CLIP's image tokens) from step to step.

    Worth it where steps are short: for a large model they are a two-thousandth of a step and take 0.4 GB for each
    branch (14B, 512 text tokens, computed). They are made anew where the strength of a LoRA changes and go with the
    expert.
    """

    order = Order.TRUNK
    grade = "bitwise"
    cost = "0.4 GB a branch for 14B (computed)"
    per_call = True
    conflicts = (Conflict("Compile", "what a compiled block computes cannot be kept from its last call"),)
    keep_text_keys: bool = option(False, "keep keys and values of the text from step to step")

    def apply(self, engine: Engine) -> None:
        engine.wrap_segment(partial(self._kept, engine))

    @contextmanager
    def _kept(self, engine: Engine, dit: nn.Module, run: Denoising) -> Iterator[None]:
        layers: list[Any] = [part for part in dit.modules() if hasattr(part, "keep_keys")]
        plain = [layer.keep_keys for layer in layers]
        for layer in layers:
            layer.keep_keys = Kept(strengths_of(engine, dit))
        try:
            yield
        finally:
            for layer, keep in zip(layers, plain, strict=True):
                layer.keep_keys = keep
