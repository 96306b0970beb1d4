"""The classes with the safe optimisations as plain keywords, for code that has no command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan.animate import WanAnimate
from wan.first_last_frame2video import WanFLF2V
from wan.image2video import WanI2V
from wan.pipeline import WanPipeline
from wan.speech2video import WanS2V
from wan.text2video import WanT2V
from wan.textimage2video import WanTI2V
from wan.vace import WanVace


class Optimized(WanPipeline):
    """What stands before a class: torch.compile and TF32 on by default; all further arguments are that class's.

    Both change results by rounding only. Without CUDA `enable_compile` defaults to off: on a CPU compiling takes
    longer than it saves.
    """

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path | None,
        *args: Any,
        enable_compile: bool | None = None,
        enable_tf32: bool = True,
        compile_mode: str = "default",
        **kwargs: Any,
    ) -> None:
        if enable_compile is None:
            import torch

            enable_compile = torch.cuda.is_available()
        chosen = {"compile": enable_compile, "tf32": enable_tf32, "compile_mode": compile_mode}
        super().__init__(config, checkpoint_dir, *args, **(chosen | kwargs))


class WanT2VOptimized(Optimized, WanT2V):
    """`WanT2V`, optimised."""


class WanI2VOptimized(Optimized, WanI2V):
    """`WanI2V`, optimised."""


class WanFLF2VOptimized(Optimized, WanFLF2V):
    """`WanFLF2V`, optimised."""


class WanTI2VOptimized(Optimized, WanTI2V):
    """`WanTI2V`, optimised."""


class WanVaceOptimized(Optimized, WanVace):
    """`WanVace`, optimised."""


class WanS2VOptimized(Optimized, WanS2V):
    """`WanS2V`, optimised."""


class WanAnimateOptimized(Optimized, WanAnimate):
    """`WanAnimate`, optimised."""
