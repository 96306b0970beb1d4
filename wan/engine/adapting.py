"""LoRAs at run time: what they add stays beside the weights, so that strengths may change by the step and files by the
video, and weights that cannot be added to (quantised ones) need not be.

Two ways. A layer inside a block gets the thin matrices beside it (`LowRank`), or, with `dense`, its merged weight for
the time of its block's call. What is not such a layer (biases, norms, modulation, everything outside the blocks) is
always exchanged for a changed copy while it computes. The Parameter objects stay the same, and nothing of this is in
the state dict's values: when no call is running, every weight is the checkpoint's, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.float8 import quantize_weight
from wan.engine.weights.lora import Delta, LoRAFile

RunBlock = Callable[..., Any]
_Identity = tuple[Path, int, int]
"""A file by path, time and size."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Counts:
    """What the thin matrices cost beside computing: reading, and whether a call found them on the device."""

    read_seconds: float = 0.0
    tensors_read: int = 0
    hits: int = 0
    misses: int = 0
    copied_bytes: int = 0


class Thin:
    """The matrices beside one layer, those of all LoRAs as one pair: down [R, in], up [out, R], factors [R] or [L, R].

    No module and no tensor attribute of one, so that what moves networks does not move these.
    """

    def __init__(self) -> None:
        self.down: Tensor | None = None
        self.up: Tensor | None = None
        self.factors: Tensor | None = None


class LowRank(nn.Module):
    """A layer and what `thin` adds to it: base(x) + up (factors * (down x))."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.thin = Thin()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        thin = self.thin
        if thin.down is None or thin.up is None or thin.factors is None:
            return out
        return out + F.linear(F.linear(x, thin.down) * thin.factors, thin.up)


@dataclass
class _Patch:
    """A weight that is exchanged while it computes, and what each LoRA that changes it adds.

    `tensors` are the weight, or its codes in 8 bits and their scales: a changed one is quantised anew.
    """

    tensors: tuple[Tensor, ...]
    deltas: list[tuple[int, Delta]]
    made: tuple[Tensor, ...] | None = None
    """The changed tensors, for as long as they may be kept."""

    def changed(self, strengths: Sequence[float]) -> tuple[Tensor, ...]:
        base, *scale = (tensor.data for tensor in self.tensors)
        total = base.to(torch.float32, copy=True)
        if scale:
            total.mul_(scale[0])
        for number, delta in self.deltas:
            delta.to(base.device).add_to(total, strengths[number])
        return quantize_weight(total) if scale else (total.to(base.dtype),)


@dataclass
class _Beside:
    """The thin matrices of one layer in RAM: those of each LoRA with its number."""

    layer: LowRank
    deltas: list[tuple[int, Delta]]

    @property
    def behind(self) -> bool:
        """Whether some of it acts on the tokens behind the video's alone."""
        return any(delta.behind for _, delta in self.deltas)


@dataclass
class _BlockParts:
    """What LoRAs change in one block."""

    beside: list[_Beside] = field(default_factory=list)
    patches: list[_Patch] = field(default_factory=list)


class Adapted:
    """One network, as LoRAs change it while it computes. `dense` merges a block's weights for the time of its call.

    `visits` says of a block whether its weights are on the device during its own call alone; what is beside them then
    comes and goes with them.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, *, dense: bool, visits: Callable[[nn.Module], bool] | None = None
    ) -> None:
        self.module = module
        self.dense = dense
        self.counts = Counts()
        self._device = device
        self._visits = visits or self._rests_elsewhere
        self._tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
        self._block_of = dict(blocks_by_key(module, self._tensors))
        self._used: list[_Identity] = []
        self._read: dict[_Identity, dict[str, Delta]] = {}
        self._strengths: tuple[float, ...] = ()
        self._blocks: dict[nn.Module, _BlockParts] = {}
        self._visiting: set[nn.Module] = set()
        self._outside: list[_Patch] = []
        self._early: list[_Patch] = []
        """Of blocks, read before they run: exchanged as what is outside them is."""
        self._factors: dict[tuple[object, ...], Tensor] = {}
        module.run_block = self._wrap(module.run_block)  # type: ignore[assignment,arg-type]

    def load(self, files: Sequence[LoRAFile]) -> None:
        """Take these files from now on; of those that were in use before nothing is read again."""
        named = {_identity(file.path): file for file in files}
        used = [_identity(file.path) for file in files]
        if used == self._used:
            return
        started = time.perf_counter()
        self.leave()
        self._used, self._strengths = used, ()
        self._read = {known: deltas for known, deltas in self._read.items() if known in named}
        for identity, file in named.items():
            if identity not in self._read:
                file.check({key: tuple(tensor.shape) for key, tensor in self._tensors.items()})
                changed = [key for key in self._tensors if file.changes(key)]
                self._read[identity] = {key: self._kept(key, file.delta(key)) for key in changed}
                self.counts.tensors_read += len(changed)
        self._arrange([self._read[identity] for identity in used])
        self.counts.read_seconds += time.perf_counter() - started

    @contextmanager
    def at(self, strengths: tuple[float, ...]) -> Iterator[None]:
        """Compute with these strengths, one for each file, while the context is open."""
        if strengths != self._strengths:
            self._strengths = strengths
            self._factors = {}
            for patch in self._all_patches():
                patch.made = None
        self._visiting = {block for block in self._blocks if self._visits(block)}
        with self._exchanged([*self._outside, *self._early], keep=True):
            yield

    def leave(self) -> None:
        """Give back the memory on the device."""
        self._factors = {}
        for patch in self._all_patches():
            patch.made = None
        for parts in self._blocks.values():
            for beside in parts.beside:
                _clear(beside.layer.thin)

    @property
    def strengths(self) -> tuple[float, ...]:
        """How strongly each file acts now."""
        return self._strengths

    @property
    def changes_outside_blocks(self) -> bool:
        """Whether something outside the blocks is changed, such as what embeds the text."""
        return bool(self._outside)

    # Arranging -----------------------------------------------------------------------------------------------------

    def _arrange(self, deltas: Sequence[Mapping[str, Delta]]) -> None:
        """Sort what is changed into layers that get thin matrices and tensors that are exchanged, by block."""
        self._blocks, self._outside, self._early = {}, [], []
        early = self.module.read_by_trunk()  # type: ignore[operator]
        for key, tensor in self._tensors.items():
            mine = [(number, each[key]) for number, each in enumerate(deltas) if key in each]
            if not mine:
                continue
            block = self._block_of.get(key)
            parts = _BlockParts() if block is None else self._blocks.setdefault(block, _BlockParts())
            together = all(self._goes_beside(key, delta) for _, delta in mine)
            if beside := [each for each in mine if together or each[1].behind]:
                parts.beside.append(_Beside(self._low_rank(key), beside))
            if not (rest := [each for each in mine if not (together or each[1].behind)]):
                continue
            scale = self._tensors.get(f"{key}_scale")
            tensors = (tensor,) if scale is None else (tensor, scale)
            elsewhere = self._early if key in early else self._outside
            (elsewhere if block is None else parts.patches).append(_Patch(tensors, rest))

    def _goes_beside(self, key: str, delta: Delta) -> bool:
        return not self.dense and delta.down is not None and key in self._block_of and key.endswith(".weight")

    def _low_rank(self, key: str) -> LowRank:
        """The layer of this weight, with a place beside it from now on."""
        place, _, last = key.removesuffix(".weight").rpartition(".")
        parent = self.module.get_submodule(place)
        layer = parent.get_submodule(last)
        if not isinstance(layer, LowRank):
            layer = LowRank(layer)
            parent._modules[last] = layer
        return layer

    def _kept(self, key: str, delta: Delta) -> Delta:
        """`delta` in RAM, whence it is copied to the device without waiting; as it will be computed with."""
        if delta.down is not None and delta.up is not None and self._goes_beside(key, delta):
            dtype = compute_dtype(self._tensors, key)
            scaled = (delta.up.float() * delta.scale).to(dtype)
            delta = replace(delta, down=delta.down.to(dtype), up=scaled, scale=1.0)
        down, up, diff = (None if t is None else self._pinned(t) for t in (delta.down, delta.up, delta.diff))
        return replace(delta, down=down, up=up, diff=diff)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _all_patches(self) -> list[_Patch]:
        return [*self._outside, *self._early, *(patch for parts in self._blocks.values() for patch in parts.patches)]

    # Computing -----------------------------------------------------------------------------------------------------

    def _wrap(self, run_block: RunBlock) -> RunBlock:
        def run(block: nn.Module, *arguments: Any) -> Any:
            parts = self._blocks.get(block)
            if parts is None or not self._strengths:
                return run_block(block, *arguments)
            visiting = block in self._visiting
            for beside in parts.beside:
                self._bring(beside, *arguments)
            # A block's merged weights would be a second copy of the network if they were kept.
            with self._exchanged(parts.patches, keep=not visiting and not self.dense):
                out = run_block(block, *arguments)
            for beside in parts.beside:
                if visiting:
                    _clear(beside.layer.thin)
                elif beside.behind:  # a number for each token is not kept
                    beside.layer.thin.factors = None
            return out

        return run

    def _bring(self, beside: _Beside, *arguments: Any) -> None:
        """Have the thin matrices of a layer on the device, with today's factors. Waits for nothing.

        `arguments` are what the block is called with: tokens, and what says which of them are the video's.
        """
        thin = beside.layer.thin
        if thin.down is not None:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
            moved = [delta.to(self._device) for _, delta in beside.deltas]
            thin.down = _joined([delta.down for delta in moved], 0)
            thin.up = _joined([delta.up for delta in moved], 1)
            self.counts.copied_bytes += thin.down.nbytes + thin.up.nbytes
        thin.factors = self._factors_of(beside.deltas, thin.down.dtype, behind=False)
        if beside.behind:
            behind = self._factors_of(beside.deltas, thin.down.dtype, behind=True)
            thin.factors = torch.where(arguments[1].frames[:, None] < 0, behind, thin.factors)

    def _factors_of(self, deltas: Sequence[tuple[int, Delta]], dtype: torch.dtype, *, behind: bool) -> Tensor:
        """The strength [R] of each rank of a layer's thin matrices, for tokens of the video or those behind them.

        Layers with the same ranks share them.
        """
        ranks = tuple((n, len(delta.down), behind or not delta.behind) for n, delta in deltas if delta.down is not None)
        if (ranks, dtype) not in self._factors:
            factors = [self._strengths[number] * acts for number, rank, acts in ranks for _ in range(rank)]
            told = self._pinned(torch.tensor(factors, dtype=dtype))
            self._factors[ranks, dtype] = told.to(self._device, non_blocking=True)
        return self._factors[ranks, dtype]

    @contextmanager
    def _exchanged(self, patches: Sequence[_Patch], *, keep: bool) -> Iterator[None]:
        """The changed tensors in the place of the network's own, which come back whatever happens."""
        own = [[tensor.data for tensor in patch.tensors] for patch in patches]
        try:
            with torch.inference_mode(False), torch.no_grad():
                for patch in patches:
                    made = patch.changed(self._strengths) if patch.made is None else patch.made
                    patch.made = made if keep else None
                    _point(patch.tensors, made)
            yield
        finally:
            with torch.inference_mode(False):
                for patch, data in zip(patches, own, strict=True):
                    _point(patch.tensors, data)

    def _rests_elsewhere(self, block: nn.Module) -> bool:
        return any(tensor.device.type != self._device.type for tensor in block.parameters())


def _point(tensors: Sequence[Tensor], data: Sequence[Tensor]) -> None:
    for tensor, place in zip(tensors, data, strict=True):
        tensor.data = place


def blocks_by_key(module: nn.Module, keys: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The block of each of `keys` that belongs to one and is read when it runs."""
    blocks = set(module.all_blocks())  # type: ignore[operator]
    prefixes = {f"{name}.": part for name, part in module.named_modules() if part in blocks}
    early = module.read_by_trunk()  # type: ignore[operator]
    for key in keys:
        if key in early:
            continue
        for prefix, block in prefixes.items():
            if key.startswith(prefix):
                yield key, block


def _joined(tensors: Sequence[Tensor | None], dim: int) -> Tensor:
    found = [tensor for tensor in tensors if tensor is not None]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def compute_dtype(tensors: Mapping[str, Tensor], key: str) -> torch.dtype:
    """What a layer computes in: the dtype of its weight, or of its bias where the weight is quantised."""
    bias = tensors.get(key.removesuffix("weight") + "bias")
    found = (tensor.dtype for tensor in (tensors[key], bias) if tensor is not None)
    return next((dtype for dtype in found if dtype in FLOATS), torch.bfloat16)


def _clear(thin: Thin) -> None:
    thin.down = thin.up = thin.factors = None


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return path, status.st_mtime_ns, status.st_size
