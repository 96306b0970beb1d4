"""Transformer blocks that live in RAM and visit the GPU one after the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.placement import Policy, tensors_of
from wan.engine.plan import Optimization, Order
from wan.engine.swapping import Swap, block_bytes_of, fewest_swapped, homes_of, swapped_blocks
from wan.engine.types import Component

if TYPE_CHECKING:
    from wan.engine.engine import Engine

AUTO_LEAVES = 8 * 2**30
"""Of the GPU, for all that is not weights: a 14B step at 1280x720x81 takes 6.7 GB (computed)."""


@dataclass(frozen=True, kw_only=True)
class BlockSwap(Optimization):
    """Keep N of the DiT's blocks in pinned RAM and copy each to the GPU while the block before it computes.

    The swapped blocks are spread evenly and share prefetch_blocks + 1 slots on the GPU; the rest of the DiT is placed
    as `offload_model` says. The copies hide behind the computing where blocks take longer than their copy: at 720p, not
    at small sizes, where fewer swapped blocks help, or one visit that serves both guidance branches (`lockstep_cfg`,
    `use_batched_cfg`). "auto" swaps as few blocks as leave 8 GiB of the memory that was free at the start, less what
    other networks hold, and none on a CPU. Both experts swap N each.
    """

    order = Order.PLACEMENT
    grade = "bitwise"
    cost = "RAM for the blocks; time where their copies do not hide behind computing"
    block_swap: int | Literal["auto"] = option(0, "how many transformer blocks live in RAM; 0 is none")
    prefetch_blocks: int = option(1, "how many swapped blocks are copied ahead; one more is on the GPU")

    def check(self, hardware: Hardware) -> None:
        if self.block_swap != "auto" and self.block_swap < 0:
            raise BadRequest(f"--block_swap {self.block_swap}: give a number of blocks from 0 on, or auto")
        if self.prefetch_blocks < 0:
            raise BadRequest(f"--prefetch_blocks {self.prefetch_blocks}: give a number of blocks from 0 on; 1 is usual")

    def check_component(self, component: Component) -> None:
        if not component.is_expert or self.block_swap == "auto":
            return
        total = len(component.build().all_blocks())  # type: ignore[operator]
        if self.block_swap > total:
            raise BadRequest(f"--block_swap {self.block_swap}: {component.name!r} has {total} blocks to swap, not more")

    def place(self, module: nn.Module, name: str, engine: Engine) -> Mapping[str, Tensor | torch.device]:
        blocks = self._blocks(module, name, engine)
        if not blocks:
            return {}
        return homes_of(module, blocks, pin=engine.hardware.is_cuda, stay=module.read_by_trunk())  # type: ignore[operator]

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if blocks := self._blocks(module, name, engine):
            stay = module.read_by_trunk().values()  # type: ignore[operator]
            swap = Swap(blocks, engine.device, prefetch=self.prefetch_blocks, stay=stay)
            engine.placement.swap(name, swap)
            module.run_block = swap.wrap(module.run_block)  # type: ignore[assignment,arg-type]
            logging.getLogger(__name__).info("%s: %d blocks live in RAM", name, len(blocks))

    def _blocks(self, module: nn.Module, name: str, engine: Engine) -> list[nn.Module]:
        """Those of a network that are swapped: the same before and after its weights are read."""
        if name not in engine.expert_names:
            return []
        blocks: list[nn.Module] = module.all_blocks()  # type: ignore[operator]
        if self.block_swap != "auto":
            return swapped_blocks(blocks, self.block_swap)
        if not engine.hardware.is_cuda:
            return []
        sizes = block_bytes_of(blocks)
        rest = sum(tensor.nbytes for tensor in tensors_of(module)) - sum(sizes)
        available = engine.hardware.free_memory - AUTO_LEAVES - rest - _held_by_others(engine)
        return swapped_blocks(blocks, fewest_swapped(sizes, self.prefetch_blocks, available))


def _held_by_others(engine: Engine) -> int:
    """Bytes on the GPU of networks that were loaded before and stay."""
    loaded, policy = engine.placement.loaded(), engine.placement.policy
    staying = [network for name, network in loaded.items() if policy(name) is Policy.RESIDENT]
    return sum(tensor.nbytes for network in staying for tensor in tensors_of(network) if tensor.is_cuda)
