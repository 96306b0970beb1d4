"""Peak bytes of tensors that are alive at once, counted op by op.

On the meta device nothing is allocated or computed, so a forward of 14B at 720p is counted in seconds on any machine;
benchmarks and tests see there what a card would have to hold. Memory that kernels take inside (workspaces) and what
an allocator rounds up or fragments is not seen, but for attention's row sums, which every fused kernel writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "peak_live_bytes"]

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_ALIKE = (_ATEN.layer_norm.default, _ATEN.rms_norm.default)
"""One kernel on a card that leaves a tensor like its first; on the meta device a chain of slow Python functions."""


class LiveBytes(TorchDispatchMode):
    """Follows every storage that comes to be inside: `now` bytes are alive, at most `peak` were.

    Storages that were there before (weights, inputs) do not count, views of them neither. Run it in inference mode:
    there a layer or a norm is seen as the one operation that it is on a card. `alive` names the operations that made
    what is alive, for those who look for waste.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, tuple[str, tuple[int, ...], int]] = {}
        self.at_peak: list[tuple[str, tuple[int, ...], int]] = []
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        inside = 0
        if func is _ATTENTION and args[0].is_meta:
            out, inside = _fused_attention(*args, **kwargs)
        elif func in _ALIKE and args[0].is_meta:
            out = torch.empty_like(args[0], memory_format=torch.contiguous_format)
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf)._cdata not in known:
                self._watch(leaf, str(func))
        if self.now + inside > self.peak:
            self.peak, self.at_peak = self.now + inside, list(self.alive.values())
        return out

    def _watch(self, tensor: Tensor, name: str) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._watched:
            return
        self.alive[key] = name, tuple(tensor.shape), storage.nbytes()
        self.now += storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= self.alive.pop(key)[2]
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)


def peak_live_bytes(fn: Callable[[], object]) -> int:
    """The most bytes that tensors made by `fn()` occupied at one moment; run in inference mode."""
    with torch.inference_mode(), LiveBytes() as live:
        fn()
    return live.peak


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> tuple[Tensor, int]:
    """What a fused kernel leaves, laid out as the queries, and the bytes of its float32 sum for every row.

    PyTorch's own answer on the meta device is that of the plain formula: all scores at once, which no card ever holds.
    """
    out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, 4 * q.shape[:-1].numel()
