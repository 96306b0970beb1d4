"""Queries, keys and values of the tokens by one matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from wan.engine.ops.linear import Joined
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine
    from wan.engine.types import Denoising


@dataclass(frozen=True, kw_only=True)
class FusedQKV(Optimization):
    """Make queries, keys and values of self-attention by one matrix product in place of three: for small videos and
    single pictures, whose tokens do not fill a card three times over.

    The three weights are put side by side where the network computes, one layer at a time, and stay the checkpoint's
    parameters: none is there twice. The norms and the rotary embedding work inside the common result. From some 12 000
    tokens on the products fill a card by themselves and nothing is gained (computed). Layers that a LoRA is added to
    while it computes are projected one by one as long as it is there; merged LoRAs change nothing.
    """

    order = Order.TRUNK
    grade = "rounding"
    tolerance = 1e-2
    cost = "weights of a layer are copied together when an expert begins"
    per_call = True
    conflicts = (
        Conflict("Compile", "a compiled block takes each weight by itself"),
        Conflict("BlockSwap", "a block that visits brings its weights one by one"),
        Conflict("FP8", "layers in 8 bits share their input, and each has scales of its own"),
        Conflict("AttentionRows", "it makes queries by themselves, some tokens at a time"),
    )
    fuse_qkv: bool = option(False, "queries, keys and values of self-attention by one matrix product")

    def apply(self, engine: Engine) -> None:
        engine.wrap_segment(joined)


@contextmanager
def joined(dit: nn.Module, run: Denoising) -> Iterator[None]:
    """The network with its self-attentions' projections joined; what joins them would hold weights that leave."""
    layers: list[Any] = [part for part in dit.modules() if "project" in vars(part) and part.role == "self"]
    plain = [layer.project for layer in layers]
    try:
        for layer in layers:
            if Joined.can_join(parts := (layer.q, layer.k, layer.v)):
                layer.project = Joined(parts)
        yield
    finally:
        for layer, project in zip(layers, plain, strict=True):
            layer.project = project
