"""Networks larger than the device: blocks live in RAM and are copied into a few slots while other blocks compute.

`Swap` decides what is copied when, a `CopyEngine` acts, so that the order can be tested without a GPU. Outside their
own call the parameters of a swapped block are always those in RAM; during it their data is a view into a slot. The
Parameter objects stay the same: compiled code checks objects, shapes, dtypes and devices, none of which change from
call to call, and never addresses. CUDA graphs do hold addresses: a block meets at most as many as there are slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wan.engine.arena import Arena, aligned
from wan.engine.placement import tensors_of

RunBlock = Callable[..., Any]
"""`(block, *arguments) -> what the block returns`: the seam `run_block` of a network."""


class CopyEngine(Protocol):
    """Copies into slots beside the computing; tests use one that records."""

    def fetch(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy each (target, source) once all that was `computed` with the slot has ended. Does not wait."""

    def arrive(self, slot: int) -> None:
        """Let what is computed from now on begin after the last `fetch` into the slot."""

    def computed(self, slot: int) -> None:
        """What was started until now is all that computes with what the slot holds."""

    def finish(self) -> None:
        """Wait until nothing is being copied."""


class PlainCopies:
    """Copies at once, where there is nothing beside which to copy."""

    def fetch(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        for target, source in copies:
            target.copy_(source)

    def arrive(self, slot: int) -> None: ...

    def computed(self, slot: int) -> None: ...

    def finish(self) -> None: ...


class StreamCopies:
    """Copies on a CUDA stream of their own. Nothing here makes the CPU wait but `finish`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._arrivals: dict[int, torch.cuda.Event] = {}
        self._releases: dict[int, torch.cuda.Event] = {}

    def fetch(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._releases[slot])
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            self._arrivals[slot] = self._stream.record_event()

    def arrive(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrivals[slot])

    def computed(self, slot: int) -> None:
        self._releases[slot] = torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        self._stream.synchronize()


@dataclass(frozen=True)
class _Stored:
    """A block in RAM: its tensors, where they live, and their bytes in as few runs as memory allows."""

    tensors: tuple[Tensor, ...]
    homes: tuple[Tensor, ...]
    runs: tuple[tuple[int, Tensor], ...]
    """(place in a slot, bytes)."""
    num_bytes: int

    def point(self, places: Sequence[Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place


class Swap:
    """Those blocks of a network that live in RAM. They are fetched in the order given, round and round.

    While one computes, the next `prefetch` are copied. A block that comes out of turn is fetched when it is needed. One
    that is called again before any other block is still there: it gives its slot back when the next one begins.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        prefetch: int,
        copies: CopyEngine | None = None,
        others: Sequence[Tensor] = (),
        stay: Iterable[Tensor] = (),
    ) -> None:
        """`others` are tensors of the network that stay in RAM and are never fetched, `stay` those of blocks that are
        where the rest of the network is."""
        self._device = device
        self._copies = copies or (StreamCopies(device) if device.type == "cuda" else PlainCopies())
        self._positions = {block: position for position, block in enumerate(blocks)}
        here = set(map(id, stay))
        self._stored = [_stored([each for each in tensors_of(block) if id(each) not in here]) for block in blocks]
        self._others = tuple(others)
        self._count = num_slots(len(blocks), prefetch)
        self._slots: list[Tensor] = []
        self._holds: dict[int, int] = {}
        self._free: deque[int] = deque()
        self._coming: deque[tuple[int, int]] = deque()
        """(position, slot) of the blocks in or on their way to a slot that have not run yet, in order."""
        self._visiting: tuple[int, int] | None = None
        """(position, slot) of the block that ran last, while no other has begun."""

    def tensors(self) -> list[Tensor]:
        """What stays in RAM."""
        return [tensor for stored in self._stored for tensor in stored.tensors] + list(self._others)

    def wrap(self, run_block: RunBlock) -> RunBlock:
        """`run_block` for a network of which these blocks are a part."""

        def run(block: nn.Module, *arguments: Any) -> Any:
            if block not in self._positions:
                self._leave()
                return run_block(block, *arguments)
            with self._on_device(self._positions[block]):
                return run_block(block, *arguments)

        return run

    def release(self) -> None:
        """Give back the slots."""
        if self._slots:
            self._copies.finish()
        self._slots, self._holds, self._visiting = [], {}, None
        self._free.clear()
        self._coming.clear()

    @contextmanager
    def _on_device(self, position: int) -> Iterator[None]:
        slot = self._enter(position)
        stored = self._stored[position]
        with torch.inference_mode(False):
            stored.point(_views(self._slots[slot], stored.homes))
        try:
            yield
        finally:
            with torch.inference_mode(False):
                stored.point(stored.homes)
            self._copies.computed(slot)

    def _enter(self, position: int) -> int:
        """The slot in which the block is from now on."""
        if not self._slots:
            self._open()
        if self._visiting is None or self._visiting[0] != position:
            self._leave()
            while self._coming and self._coming[0][0] != position:
                self._free.append(self._coming.popleft()[1])
            self._fetch_from(position)
            self._visiting = self._coming.popleft()
            self._copies.arrive(self._visiting[1])
        return self._visiting[1]

    def _leave(self) -> None:
        """Give the slot of the block that ran last to those that follow it."""
        if self._visiting is not None:
            position, slot = self._visiting
            self._visiting = None
            self._free.append(slot)
            self._fetch_from((position + 1) % len(self._stored))

    def _open(self) -> None:
        size = max(stored.num_bytes for stored in self._stored)
        with torch.inference_mode(False):
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self._count)]
        for slot in range(self._count):
            self._copies.computed(slot)  # the memory may have been another tensor's a moment ago
        self._free.extend(range(self._count))

    def _fetch_from(self, position: int) -> None:
        """Fill the free slots with the blocks that follow those on their way, or from `position` on."""
        if self._coming:
            position = (self._coming[-1][0] + 1) % len(self._stored)
        while self._free:
            slot = self._free.popleft()
            if self._holds.get(slot) != position:
                runs = self._stored[position].runs
                target = self._slots[slot]
                self._copies.fetch(slot, [(target[start : start + len(run)], run) for start, run in runs])
                self._holds[slot] = position
            self._coming.append((position, slot))
            position = (position + 1) % len(self._stored)


class RowsFromRAM(nn.Embedding):
    """A table that stays in RAM: only the rows that were looked up come to where their numbers are."""

    def forward(self, numbers: Tensor) -> Tensor:
        return super().forward(numbers.to(self.weight.device)).to(numbers.device)


def homes_of(
    module: nn.Module, blocks: Sequence[nn.Module], *, pin: bool, stay: Collection[str] = ()
) -> dict[str, Tensor | torch.device]:
    """Memory for the weights of some blocks of a module on the meta device, by key; a block's lie side by side.

    Those that `stay` where the rest of the module goes get none.
    """
    names = {block: name for name, block in module.named_modules()}
    tensors = {f"{names[block]}.{key}": tensor for block in blocks for key, tensor in block.state_dict().items()}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in stay}
    arena = Arena(sum(map(aligned, tensors.values())), pin=pin)
    return {key: arena.take(tensor) for key, tensor in tensors.items()}


def swapped_blocks(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """The `count` blocks that are swapped: spread evenly, so that those between them hide the copies."""
    return [blocks[position] for position in _spread(len(blocks), count)]


def swap_bytes(block_bytes: Sequence[int], n: int, prefetch: int) -> int:
    """Bytes on the device for a network's blocks when `n` of them are swapped: those that stay, and the slots.

    A slot has the size of the largest swapped block, and there are `prefetch` + 1, or `n` if that is less.
    """
    swapped = set(_spread(len(block_bytes), n))
    slot = max((block_bytes[position] for position in swapped), default=0)
    resident = sum(size for position, size in enumerate(block_bytes) if position not in swapped)
    return resident + num_slots(n, prefetch) * slot


def fewest_swapped(block_bytes: Sequence[int], prefetch: int, available: int) -> int:
    """The smallest number of blocks whose swapping makes all fit into `available` bytes, or all of them."""
    counts = range(len(block_bytes))
    return next((n for n in counts if swap_bytes(block_bytes, n, prefetch) <= available), len(block_bytes))


def block_bytes_of(blocks: Sequence[nn.Module]) -> list[int]:
    """The bytes each block takes in a slot."""
    return [sum(map(aligned, tensors_of(block))) for block in blocks]


def num_slots(n: int, prefetch: int) -> int:
    """How many slots `n` swapped blocks get."""
    return min(n, prefetch + 1)


def _spread(total: int, count: int) -> list[int]:
    return [index * total // count for index in range(count)]


def _stored(tensors: Sequence[Tensor]) -> _Stored:
    homes = tuple(tensor.data for tensor in tensors)
    runs: list[tuple[int, Tensor]] = []
    start = 0
    for home in homes:
        if runs and _follows(*runs[-1], start, home):
            first, run = runs[-1]
            runs[-1] = first, run.as_strided((start - first + _bytes(home).numel(),), (1,))
        else:
            runs.append((start, _bytes(home)))
        start += aligned(home)
    return _Stored(tuple(tensors), homes, tuple(runs), start)


def _follows(first: int, run: Tensor, start: int, home: Tensor) -> bool:
    """Whether `home` lies in the memory of `run` where it has to for being copied along with it."""
    same = run.untyped_storage().data_ptr() == home.untyped_storage().data_ptr()
    return same and run.data_ptr() + start - first == home.data_ptr()


def _bytes(home: Tensor) -> Tensor:
    return home.view(-1).view(torch.uint8)


def _views(slot: Tensor, homes: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a block inside a slot."""
    sizes = [aligned(home) for home in homes]
    views = []
    start = 0
    for home, size in zip(homes, sizes, strict=True):
        flat = slot[start : start + home.numel() * home.element_size()].view(home.dtype)
        views.append(flat.view(home.shape))
        start += size
    return views
