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
    from wan.optimized import WanAnimateOptimized as WanAnimateOptimized
    from wan.optimized import WanFLF2VOptimized as WanFLF2VOptimized
    from wan.optimized import WanI2VOptimized as WanI2VOptimized
    from wan.optimized import WanS2VOptimized as WanS2VOptimized
    from wan.optimized import WanT2VOptimized as WanT2VOptimized
    from wan.optimized import WanTI2VOptimized as WanTI2VOptimized
    from wan.optimized import WanVaceOptimized as WanVaceOptimized
    from wan.speech2video import WanS2V as WanS2V
    from wan.text2video import WanT2V as WanT2V
    from wan.textimage2video import WanTI2V as WanTI2V
    from wan.vace import WanVace as WanVace
    from wan.vace import WanVaceMP as WanVaceMP

__version__ = "0.1.0"

_CLASSES = {
    "WanAnimate": "wan.animate",
    "WanAnimateOptimized": "wan.optimized",
    "WanFLF2V": "wan.first_last_frame2video",
    "WanFLF2VOptimized": "wan.optimized",
    "WanI2V": "wan.image2video",
    "WanI2VOptimized": "wan.optimized",
    "WanS2V": "wan.speech2video",
    "WanS2VOptimized": "wan.optimized",
    "WanT2V": "wan.text2video",
    "WanT2VOptimized": "wan.optimized",
    "WanTI2V": "wan.textimage2video",
    "WanTI2VOptimized": "wan.optimized",
    "WanVace": "wan.vace",
    "WanVaceMP": "wan.vace",
    "WanVaceOptimized": "wan.optimized",
}
_PACKAGES = ("configs", "distributed", "modules", "utils")

__all__ = [
    "WanAnimate",
    "WanAnimateOptimized",
    "WanFLF2V",
    "WanFLF2VOptimized",
    "WanI2V",
    "WanI2VOptimized",
    "WanS2V",
    "WanS2VOptimized",
    "WanT2V",
    "WanT2VOptimized",
    "WanTI2V",
    "WanTI2VOptimized",
    "WanVace",
    "WanVaceMP",
    "WanVaceOptimized",
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
