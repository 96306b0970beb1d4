"""torch.compile for the VAE, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from wan.engine.compiling import Compiled, room_for_forms
from wan.engine.options import option

if TYPE_CHECKING:
    from wan.engine.engine import Engine

FORMS = 1024
"""An encoder's residual blocks share one piece of code and are compiled for each of their sizes: 20 a video size."""


@dataclass(frozen=True, kw_only=True)
class VAECompile(Compiled):
    """Compile the stages of the VAE with torch.compile, without graph breaks: norms, SiLU, what is padded, remembered
    of earlier frames and added become few passes over memory.

    A stage is compiled for the first chunk of a stream and once more for all that follow; every size of video (of
    tiles, with `vae_tiling`) is compiled for itself, and where a last chunk has fewer frames than
    `vae_frames_per_call`, that too. The first video's coding contains the compiler's time. Convolutions stay the
    libraries'. The other VAE options compose with it; what `kernels` has for the VAE is not used in what is compiled.
    """

    cost = "the compiler's time in the first video of a size"
    vae_compile: bool = option(False, "compile the stages of the VAE")

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        if name == "vae":
            for stage in module.stages():  # type: ignore[operator]
                # One code for all sizes would not know the channels of a stage either: its loops would be slow.
                stage.compile(fullgraph=True, dynamic=False, backend=self.backend)

    def apply(self, engine: Engine) -> None:
        engine.during_run(partial(room_for_forms, FORMS))
