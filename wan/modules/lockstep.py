"""Several forwards of one DiT side by side: each block computes them all before the next block begins.

Outside the blocks they are one batch, so that what wraps the trunk or runs blocks of its own meets what it knows from
batched guidance. Every matrix product is that of one branch, so the bits are those of branches one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wan.modules.blocks import BlockInputs, RunBlock, WanAttentionBlock

__all__ = ["Begun", "in_one_batch"]

Begun = tuple[Tensor, BlockInputs, Tensor]
"""A forward in front of the trunk: its tokens [B, L, D], what blocks read, the embedding of its timesteps."""


def in_one_batch(begun: Iterable[Begun], count: int) -> tuple[Tensor, BlockInputs, list[Tensor]]:
    """Tokens and inputs of `count` forwards of equal shapes as one batch that blocks compute part by part.

    With the embedding of each.
    """
    whole, items, embeddings = torch.empty(0), [], []
    for tokens, inputs, embedding in begun:
        if not items:
            whole = tokens.new_empty(count * len(tokens), *tokens.shape[1:])
        whole.chunk(count)[len(items)].copy_(tokens)
        items.append(inputs)
        embeddings.append(embedding)
        del tokens  # a residual stream, before the next one is made
    return whole, _stacked(items), embeddings


def _stacked(items: Sequence[BlockInputs]) -> BlockInputs:
    """The inputs of branches, which differ in their batches alone, as those of one batch."""
    own = [replace(item, aligned={}) for item in items]  # as large as the tokens: held once, in the batch
    return replace(
        items[0],
        modulation=torch.cat([item.modulation for item in items]),
        context=torch.cat([item.context for item in items]),
        features=_joined([item.features for item in items]),
        aligned=_joined([item.aligned for item in items]),
        branches=tuple(name for item in items for name in item.branches),
        run_block=_in_turns(own),
    )


def _in_turns(own: Sequence[BlockInputs]) -> RunBlock:
    """A `run_block` for a batch of branches: each has the block to itself, one after the other.

    It meets the very tensors of its own inputs in every step, by which what is kept of a text is found again.
    """

    def run(block: nn.Module, tokens: Tensor, inputs: BlockInputs) -> Any:
        made = []
        for index, (part, item) in enumerate(zip(tokens.chunk(len(own)), own, strict=True)):
            aligned = {name: each.chunk(len(own))[index] for name, each in inputs.aligned.items()}
            rows = None if inputs.modulated is None else inputs.modulated.chunk(len(own))[index]
            item = replace(item, aligned=aligned, modulated=rows)
            made.append(_settled(item.run_block(block, part, item), block, part))
        return _in_batch(made, tokens)

    return run


def _settled(out: Any, block: nn.Module, part: Tensor) -> Any:
    """What a block gave; tokens are written over those it was given, as they may be, so that no more of them live."""
    if not isinstance(block, WanAttentionBlock):
        return out
    tokens = out[0] if isinstance(out, tuple) else out
    if tokens.data_ptr() != part.data_ptr():
        part.copy_(tokens)
    return (part, *out[1:]) if isinstance(out, tuple) else part


def _in_batch(made: list[Any], tokens: Tensor) -> Any:
    """What a block made of the parts of `tokens`, as it would have been for the batch."""
    if isinstance(made[0], tuple):
        return tuple(_in_batch(list(each), tokens) for each in zip(*made, strict=True))
    parts = tokens.chunk(len(made))
    written = all(out.data_ptr() == part.data_ptr() for out, part in zip(made, parts, strict=True))
    return tokens if written else torch.cat(made)


def _joined(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}
