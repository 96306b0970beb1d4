"""What LoRAs at run time take beside a network, computed from headers before a weight is read.

It follows what `wan.engine.adapting` does: thin matrices lie beside layers of the blocks, every other tensor that is
changed has a changed copy while it computes, and everything that was read stays in RAM.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from wan.engine.adapting import blocks_by_key, compute_dtype
from wan.engine.prediction import Beside
from wan.engine.weights.lora import LoRAFile

__all__ = ["beside_of"]

MAKING = 4
"""Bytes a number takes while its changed copy is made: the sum in float32."""


def beside_of(module: nn.Module, files: Sequence[LoRAFile], *, dense: bool) -> Beside:
    """What `files` take beside `module`, on the meta device in its storage dtypes, where they are not merged into it.

    `dense` merges a block's weights for the time of its call.
    """
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    block_of = dict(blocks_by_key(module, tensors))
    kept: dict[nn.Module | None, int] = dict.fromkeys([None, *block_of.values()], 0)
    merged, making = dict(kept), dict(kept)
    host = elements = 0
    for key, tensor in tensors.items():
        mine = [file for file in files if file.changes(key)]
        if not mine:
            continue
        block, shape = block_of.get(key), tuple(tensor.shape)
        counts = [file.numbers(key, shape) for file in mine]
        if not dense and block is not None and key.endswith(".weight") and all(file.is_pair(key) for file in mine):
            size = sum(counts) * compute_dtype(tensors, key).itemsize
            kept[block], host, elements = kept[block] + size, host + size, elements + sum(counts)
            continue
        host += sum(count * file.dtype(key).itemsize for file, count in zip(mine, counts, strict=True))
        making[block] = max(making[block], MAKING * tensor.numel())
        parts = [tensors[name] for name in (key, f"{key}_scale") if name in tensors]
        (merged if dense and block is not None else kept)[block] += sum(part.nbytes for part in parts)
    outside = kept.pop(None)
    return Beside(
        outside=outside, in_block=sum(kept.values()) // max(1, len(kept)),
        for_call=max((merged[block] + making[block] for block in kept), default=0), host=host, elements=elements,
    )  # fmt: skip
