"""Prompts to context tensors. Where the encoder stands, and when, is the engine's business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wan.engine.types import Encoders
from wan.modules.t5 import encode_texts

__all__ = ["embed", "encode_prompts", "pad_context"]

ENCODER = "text_encoder"


def embed(encoders: Encoders, prompts: Sequence[str]) -> Tensor:
    """[B, text_len, D] on the engine's device: the context of each prompt."""
    return pad_context(encode_prompts(encoders, prompts), encoders.config.text_len)


def encode_prompts(encoders: Encoders, prompts: Sequence[str]) -> list[Tensor]:
    """Hidden states [S_i, D] of each prompt, on the engine's device. Without a new text the encoder is not even loaded.

    Every text is encoded alone: in a batch its last bits would depend on how long the others are.
    """
    cache, how = encoders.embeddings, _way(encoders)
    states: dict[str, Tensor] = {}
    for text in prompts if cache is not None else ():
        if (found := cache.get(text, how)) is not None:
            states[text] = found.to(encoders.device)
    missing = [text for text in dict.fromkeys(prompts) if text not in states]
    if missing:
        with encoders.use(ENCODER) as encoder:
            device = encoders.where(ENCODER)
            fresh = {text: encode_texts(encoder, encoder.tokenizer, [text], device)[0] for text in missing}
        for text, rows in fresh.items():
            if cache is not None:
                cache.put(text, how, rows)
            states[text] = rows.to(encoders.device)
    return [states[text] for text in prompts]


def pad_context(states: Sequence[Tensor], text_len: int) -> Tensor:
    """[B, text_len, D]: the states [S_i, D], each followed by zero rows.

    The DiT sees the padding as zeros and attends to it unmasked, as it was trained (upstream: `WanModel.forward`).
    """
    longest = max(len(rows) for rows in states)
    if longest > text_len:
        raise ValueError(f"a prompt has {longest!r} tokens, more than text_len={text_len!r}; cut it when tokenizing.")
    return torch.stack([nn.functional.pad(rows, (0, 0, 0, text_len - len(rows))) for rows in states])


def _way(encoders: Encoders) -> dict[str, Any]:
    """What beside text, weights and packages decides the bits of an embedding."""
    device = encoders.where(ENCODER)
    way = {"text_len": encoders.config.text_len, "dtype": str(encoders.config.t5_dtype), "device": device.type}
    if device.type == "cuda":
        precision = torch.backends.cuda.matmul.allow_tf32
        return way | {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "tf32": precision}
    return way | {"name": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
