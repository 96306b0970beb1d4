"""Prompts to context tensors. Where the encoder stands, and when, is the engine's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["encode_prompts", "pad_context"]

TextEncoder = Callable[[Sequence[str], torch.device], list[Tensor]]


def encode_prompts(encoder: TextEncoder, prompts: Sequence[str], device: torch.device | str) -> list[Tensor]:
    """Hidden states [S_i, D] of each prompt, each distinct prompt encoded once, all in one forward on `device`."""
    distinct = list(dict.fromkeys(prompts))
    states = dict(zip(distinct, encoder(distinct, torch.device(device)), strict=True))
    return [states[prompt] for prompt in prompts]


def pad_context(states: Sequence[Tensor], text_len: int) -> Tensor:
    """[B, text_len, D]: the states [S_i, D], each followed by zero rows.

    The DiT sees the padding as zeros and attends to it unmasked, as it was trained (upstream: `WanModel.forward`).
    """
    longest = max(len(rows) for rows in states)
    if longest > text_len:
        raise ValueError(f"a prompt has {longest!r} tokens, more than text_len={text_len!r}; cut it when tokenizing.")
    return torch.stack([nn.functional.pad(rows, (0, 0, 0, text_len - len(rows))) for rows in states])
