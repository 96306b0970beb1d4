"""Wan video generation: upstream's package, classes loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan import configs as configs
    from wan import distributed as distributed
    from wan import modules as modules
    from wan.animate import WanAnimate as WanAnimate
    from wan.first_last_frame2video import WanFLF2V as WanFLF2V
    from wan.image2video import WanI2V as WanI2V
    from wan.speech2video import WanS2V as WanS2V
    from wan.text2video import WanT2V as WanT2V
    from wan.text2video_optimized import WanT2VOptimized as WanT2VOptimized
    from wan.textimage2video import WanTI2V as WanTI2V
    from wan.vace import WanVace as WanVace
    from wan.vace import WanVaceMP as WanVaceMP

__version__ = "0.1.0"

_CLASSES = {
    "WanAnimate": "wan.animate",
    "WanFLF2V": "wan.first_last_frame2video",
    "WanI2V": "wan.image2video",
    "WanS2V": "wan.speech2video",
    "WanT2V": "wan.text2video",
    "WanT2VOptimized": "wan.text2video_optimized",
    "WanTI2V": "wan.textimage2video",
    "WanVace": "wan.vace",
    "WanVaceMP": "wan.vace",
}
_PACKAGES = ("configs", "distributed", "modules", "utils")

__all__ = [
    "WanAnimate",
    "WanFLF2V",
    "WanI2V",
    "WanS2V",
    "WanT2V",
    "WanT2VOptimized",
    "WanTI2V",
    "WanVace",
    "WanVaceMP",
    "configs",
    "distributed",
    "modules",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"wan.{name}")
    raise AttributeError(f"module 'wan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES, *_PACKAGES})
