"""The network that animates a character, under upstream's names, imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"CLIPModel": "wan.modules.clip", "WanAnimateModel": "wan.modules.animate.model_animate"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
