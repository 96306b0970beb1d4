"""Upstream's first-and-last-frame-to-video class, Wan 2.1; it takes 2.2's image-to-video A14B too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from wan.image2video import WanI2V

if TYPE_CHECKING:
    from PIL.Image import Image


class WanFLF2V(WanI2V):
    """First and last frame to video. See `WanPipeline` for the constructor; `config` may be that of i2v-A14B."""

    kind = "flf2v"

    def generate(  # type: ignore[override]
        self,
        input_prompt: str,
        first_frame: Image,
        last_frame: Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 16,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float | tuple[float, float] = 5.5,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        **extras: Any,
    ) -> Tensor | None:
        """A video [3, N, H, W] in -1..1 from one picture to the other, or None when a `sink` took the frames.

        Arguments are those of `WanI2V.generate`. The first frame gives the shape; a last one of another size is scaled
        to cover it and cut at the centre. Raises BadRequest.
        """
        return super().generate(
            input_prompt, first_frame, max_area, frame_num, shift, sample_solver, sampling_steps, guide_scale, n_prompt,
            seed, offload_model, last_frame=last_frame, **extras,
        )  # fmt: skip
