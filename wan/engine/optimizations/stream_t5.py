"""The text encoder on the GPU, a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order
from wan.engine.swapping import RowsFromRAM, Swap, homes_of

if TYPE_CHECKING:
    from wan.engine.engine import Engine

ENCODER = "text_encoder"


@dataclass(frozen=True, kw_only=True)
class StreamT5(Optimization):
    """Keep the text encoder in pinned RAM and copy its layers to the GPU one after the other while it computes.

    Two layers are on the GPU at a time and of the table of embeddings only the rows of the prompt: T5-xxl in bf16 takes
    0.8 GB there instead of 11 GB (computed). The bits are the GPU's, unlike with `t5_cpu`. Costs one transfer of
    9 GB for each text.
    """

    order = Order.PLACEMENT
    grade = "bitwise"
    cost = "RAM for the encoder; one transfer of it for each text"
    conflicts = (Conflict("T5CPU", "one computes on the CPU what the other brings to the GPU"),)
    stream_t5: bool = option(False, "copy the text encoder to the GPU layer by layer while it computes")

    def convert(self, module: nn.Module, name: str) -> None:
        if name == ENCODER:
            table: nn.Embedding = module.token_embedding  # type: ignore[assignment]
            module.token_embedding = RowsFromRAM(
                table.num_embeddings, table.embedding_dim, device="meta", dtype=table.weight.dtype
            )

    def place(self, module: nn.Module, name: str, engine: Engine) -> Mapping[str, Tensor | torch.device]:
        if name != ENCODER:
            return {}
        blocks: list[nn.Module] = module.all_blocks()  # type: ignore[operator]
        homes = homes_of(module, blocks, pin=engine.hardware.is_cuda)
        return homes | {"token_embedding.weight": torch.device("cpu")}

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name == ENCODER:
            table: nn.Embedding = module.token_embedding  # type: ignore[assignment]
            swap = Swap(module.all_blocks(), engine.device, prefetch=1, others=[table.weight])  # type: ignore[operator]
            engine.placement.swap(name, swap)
            module.run_block = swap.wrap(module.run_block)  # type: ignore[assignment,arg-type]
