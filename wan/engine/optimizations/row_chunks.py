"""Feed-forward and attention for some of the tokens at a time. Less memory, the same formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.ops.rows import Around, at_once, may_write, runs
from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine

Join = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class FFNRows(Optimization):
    """Compute the feed-forward for this many tokens at a time: its hidden layer, the widest tensor of a model with a
    narrow stream (1.3B, 5B), shrinks to them.

    Every token is treated alone, so the formula is the same; a matrix product of fewer rows may be computed by another
    kernel, which rounds otherwise. Below about 4000 tokens a card is no longer filled.
    """

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 1e-2
    cost = "below about 4000 tokens a card is no longer filled"
    ffn_rows: int = option(0, "tokens the feed-forward computes at a time (0: all)")

    def check(self, hardware: Hardware) -> None:
        _positive("ffn_rows", self.ffn_rows)

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        for part in _with_seam(module, "around_ffn"):
            part.around_ffn = _layer_by_rows(self.ffn_rows)


@dataclass(frozen=True, kw_only=True)
class AttentionRows(Optimization):
    """Compute attention for this many query tokens at a time: keys and values stay whole, what belongs to queries
    (norm, projections, attention, residual) shrinks to them. Saves memory where the feed-forward is in rows too.

    The formula is the same; another number of rows may take another kernel, which rounds otherwise. The norm before
    keys and queries is computed twice. Below about 4000 tokens a card is no longer filled.
    """

    order = Order.LAYERS
    grade = "rounding"
    tolerance = 1e-2
    cost = "the norm before keys and queries twice; below about 4000 tokens a card is no longer filled"
    attention_rows: int = option(0, "query tokens attention computes at a time (0: all)")

    def check(self, hardware: Hardware) -> None:
        _positive("attention_rows", self.attention_rows)

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        for part in _with_seam(module, "around_attention"):
            if tuple(part.self_attn.window_size) != (-1, -1):
                raise IncompatibleOptions(
                    f"--attention_rows {self.attention_rows} and the attention window {part.self_attn.window_size!r} "
                    "of this model do not go together: a window counts places from all queries; drop --attention_rows"
                )
            part.around_attention = _attention_by_rows(self.attention_rows)


def _positive(name: str, value: int) -> None:
    if value < 0:
        raise BadRequest(f"--{name} {value!r}: give a number of tokens, or 0 for all at once")


def _with_seam(module: nn.Module, seam: str) -> list[Any]:
    return [part for part in module.modules() if vars(part).get(seam) is at_once]


def _layer_by_rows(count: int) -> Around:
    """A layer in which no token looks at another one, `count` of them at a time."""

    def around(layer: Any, tokens: Tensor, inputs: Any, enter: Join, leave: Join) -> Tensor:
        def part(at: slice) -> Tensor:
            return at_once(layer, tokens[:, at], inputs.at(at), enter, leave)

        return _joined(tokens, [part(at) for at in runs(tokens.shape[1], count)])

    return around


def _attention_by_rows(count: int) -> Around:
    """Attention to whole keys, `count` queries at a time."""

    def around(layer: Any, tokens: Tensor, inputs: Any, enter: Join, leave: Join) -> Tensor:
        spans = list(runs(tokens.shape[1], count))
        k, v = _keys(layer, tokens, inputs, enter, spans)
        layout = inputs.layout if layer.role == "self" else None

        def part(at: slice) -> Tensor:
            few, own = tokens[:, at], inputs.at(at)
            q = layer.queries(enter(few, own), own)
            return leave(few, layer.merge(layer.attend(q, k, v, layout), q, own), own)

        return _joined(tokens, [part(at) for at in spans])

    return around


def _keys(layer: Any, tokens: Tensor, inputs: Any, enter: Join, spans: list[slice]) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, or of the text."""
    if layer.role != "self":
        first: tuple[Tensor, Tensor] = layer.keys(tokens, inputs)
        return first

    def keys(at: slice) -> tuple[Tensor, Tensor]:
        own = inputs.at(at)
        made: tuple[Tensor, Tensor] = layer.keys(enter(tokens[:, at], own), own)
        return made

    if not may_write():
        parts = [keys(at) for at in spans]
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)
    whole: list[Tensor] = []

    def fill(at: slice) -> None:  # a function, so that one part is gone before the next one is made
        for place, part in enumerate(keys(at)):
            if place == len(whole):
                whole.append(part.new_empty(part.shape[0], tokens.shape[1], *part.shape[2:]))
            whole[place][:, at] = part

    for at in spans:
        fill(at)
    return whole[0], whole[1]


def _joined(tokens: Tensor, parts: list[Tensor]) -> Tensor:
    """The tokens of all parts. Where `leave` may write, they are views of the tokens and written already."""
    return tokens if may_write() else torch.cat(parts, 1)
