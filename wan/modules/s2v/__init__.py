"""The speech-to-video network and what it hears with, under upstream's names, imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"AudioEncoder": "audio_encoder", "WanModel_S2V": "model_s2v"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
