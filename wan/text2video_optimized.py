"""The path that `WanT2VOptimized` is known by; it stands with the other optimised classes."""

from __future__ import annotations

from wan.optimized import WanT2VOptimized

__all__ = ["WanT2VOptimized"]
