"""Memory in RAM that weights live in while they are not on the device: pinned where a GPU will read it.

In large pieces: one allocation a tensor would waste up to half, since torch rounds pinned ones up to a power of two.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

ARENA_BYTES = 2**30
ALIGNMENT = 512


class Arena:
    """`total` bytes, handed out tensor by tensor; neighbours lie side by side, but for the ends of the pieces."""

    def __init__(self, total: int, *, pin: bool) -> None:
        self._left = total
        self._pin = pin
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of that shape and dtype; pageable when the system grants no more pinned memory."""
        need = aligned(like)
        if need > len(self._block):
            self._block = _memory(max(need, min(ARENA_BYTES, self._left)), self._pin)
        piece, self._block, self._left = self._block[:need], self._block[need:], self._left - need
        flat = piece[: like.numel() * like.element_size()].view(like.dtype)
        return flat.view(like.shape)


def aligned(tensor: Tensor) -> int:
    """The bytes `tensor` takes in an arena or a slot."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _memory(num_bytes: int, pin: bool) -> Tensor:
    if pin:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("no pinned memory (%s): moves to the device will be slower", error)
    return torch.empty(num_bytes, dtype=torch.uint8)
