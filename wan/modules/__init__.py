"""Every network, under upstream's names. Each is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "HuggingfaceTokenizer": "tokenizers",
    "T5Decoder": "t5",
    "T5Encoder": "t5",
    "T5EncoderModel": "t5",
    "T5Model": "t5",
    "VaceWanModel": "vace_model",
    "Wan2_1_VAE": "vae2_1",
    "Wan2_2_VAE": "vae2_2",
    "WanModel": "model",
    "WanVAE": "vae",
    "flash_attention": "attention",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
