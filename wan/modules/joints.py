"""How the layers of a block hang on the residual stream: what is added to it, the norm a layer reads it through, and
the modulation of both.

Where nothing stands between two layers, both are one pass over memory.

Letters: B batch, L tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan.engine.ops.float8 import Quantized, all_scaled
from wan.engine.ops.modulate import (
    Norm,
    gated_add,
    gated_add_norm,
    gated_add_norm_quantize,
    layer_norm,
    layer_norm_quantize,
)
from wan.engine.ops.rows import RUN_VALUES, accumulate

if TYPE_CHECKING:
    from wan.modules.blocks import BlockInputs

__all__ = ["Enter", "Entrance", "Leave", "all_modulated", "leaving", "modulated"]

Enter = Callable[[Tensor, "BlockInputs"], Tensor | Quantized]
Leave = Callable[[Tensor, Tensor, "BlockInputs"], Tensor]


@dataclass(kw_only=True)
class Entrance:
    """LayerNorm(tokens) * weight + bias in the compute dtype, or in 8 bits where all `layers` that read it take such.

    weight and bias are [B, U, D]; one row serves all tokens. It belongs to one forward of a block.
    """

    layers: Sequence[nn.Module]
    weight: Tensor
    bias: Tensor
    eps: float
    made: Tensor | Quantized | None = field(default=None, init=False)
    """What enters, where it was made already."""

    def __call__(self, tokens: Tensor, inputs: BlockInputs) -> Tensor | Quantized:
        if self.made is not None:
            made, self.made = self.made, None
            return made
        norm = Norm(self.weight, self.bias, inputs.rows, self.eps, inputs.context.dtype)
        if all_scaled(self.layers):
            return Quantized(*layer_norm_quantize(tokens, norm), inputs.context.dtype)
        return layer_norm(tokens, norm)

    def after(self, tokens: Tensor, y: Tensor, gate: Tensor | None, inputs: BlockInputs) -> Tensor:
        """The tokens with y * gate added; what enters here is made in the same pass and kept until it is asked for."""
        norm = Norm(self.weight, self.bias, inputs.rows, self.eps, inputs.context.dtype)
        if all_scaled(self.layers):
            tokens, *codes = gated_add_norm_quantize(tokens, y, gate, norm)
            self.made = Quantized(*codes, inputs.context.dtype)
        else:
            tokens, self.made = gated_add_norm(tokens, y, gate, norm)
        return tokens


def leaving(gate: Tensor | None, then: Entrance | None) -> Leave:
    """What adds a layer's y, times its gate [B, U, D] if it has one; `then` is what reads the tokens at once."""

    def leave(tokens: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        if then is not None:
            return then.after(tokens, y, gate, inputs)
        return accumulate(tokens, y) if gate is None else gated_add(tokens, y, gate, inputs.rows)

    return leave


def modulated(own: Tensor, signal: Tensor) -> Tensor:
    """A block's modulation [1, 6, D] and a timestep's [B, U, 6, D] together, float32 [B, U, 6, D]; any dims in front.

    Shift, weight (1 + scale) and gate of the self-attention, then those of the feed-forward.
    """
    rows = own.float() + signal
    rows[..., 1::3, :] += 1
    return rows


def all_modulated(own: Sequence[Tensor], signal: Tensor) -> Tensor | None:
    """`modulated` of several blocks in three launches in place of two each; None if the table would be large."""
    if len(own) * signal.numel() > RUN_VALUES:
        return None
    return modulated(torch.stack(tuple(own))[:, :, None], signal)
