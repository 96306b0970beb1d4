"""Text to video with the safe optimisations as plain keywords, for code that has no command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan.text2video import WanT2V


class WanT2VOptimized(WanT2V):
    """`WanT2V` with torch.compile and TF32 on by default; all further arguments are `WanT2V`'s.

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
