"""Upstream's text- and image-to-video class of Wan 2.2 5B."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from wan.conditioning.first_frame import cover
from wan.conditioning.geometry import best_output_size, multiples
from wan.engine.types import Request
from wan.families.ti2v import TI2VInputs
from wan.pipeline import WanPipeline, resolve_seed, scale_pair

if TYPE_CHECKING:
    from PIL.Image import Image


class WanTI2V(WanPipeline):
    """Text to video, and image to video when a picture is given. See `WanPipeline` for the constructor.

    The picture becomes the first frame. Videos follow its shape: `max_area` limits their pixels. Arguments and
    results are those of `WanT2V.generate`, `img` is a PIL image.
    """

    kind = "ti2v"

    def generate(
        self, input_prompt: str, img: Image | None = None, size: tuple[int, int] = (1280, 704),
        max_area: int = 704 * 1280, frame_num: int = 81, shift: float = 5.0, sample_solver: str = "unipc",
        sampling_steps: int = 50, guide_scale: float | tuple[float, float] = 5.0, n_prompt: str = "", seed: int = -1,
        offload_model: bool = True, **extras: Any,
    ) -> Tensor | None:  # fmt: skip
        """`i2v` with `img`, else `t2v`."""
        sampling = shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model
        if img is not None:
            return self.i2v(input_prompt, img, max_area, frame_num, *sampling, **extras)
        return self.t2v(input_prompt, size, frame_num, *sampling, **extras)

    def t2v(
        self, input_prompt: str, size: tuple[int, int] = (1280, 704), frame_num: int = 121, shift: float = 5.0,
        sample_solver: str = "unipc", sampling_steps: int = 50, guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "", seed: int = -1, offload_model: bool = True, **extras: Any,
    ) -> Tensor | None:  # fmt: skip
        """A video from a text alone, of `size` (width, height)."""
        sampling = shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model
        return self._make(input_prompt, TI2VInputs(), size, frame_num, *sampling, **extras)

    def i2v(
        self, input_prompt: str, img: Image, max_area: int = 704 * 1280, frame_num: int = 121, shift: float = 5.0,
        sample_solver: str = "unipc", sampling_steps: int = 40, guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "", seed: int = -1, offload_model: bool = True, **extras: Any,
    ) -> Tensor | None:  # fmt: skip
        """A video that begins with `img`, of its shape and at most `max_area` pixels."""
        size = self.size_for(img, max_area)
        sampling = shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model
        return self._make(input_prompt, TI2VInputs(first=cover(img, *size)), size, frame_num, *sampling, **extras)

    def size_for(self, img: Image, max_area: int) -> tuple[int, int]:
        """The (width, height) of the video that begins with `img`."""
        across, down = multiples(tuple(self.vae_stride), tuple(self.patch_size))
        return best_output_size(img.width, img.height, across, down, max_area)

    def _make(
        self, prompt: str, inputs: TI2VInputs, size: tuple[int, int], num_frames: int, shift: float, solver: str,
        steps: int, guide_scale: float | tuple[float, float], n_prompt: str, seed: int, offload_model: bool, *,
        noise_device: str | None = None, **extras: Any,
    ) -> Tensor | None:  # fmt: skip
        request = Request(
            task="ti2v", prompt=prompt, negative_prompt=n_prompt or self.sample_neg_prompt, width=size[0],
            height=size[1], num_frames=num_frames, steps=steps, shift=shift, solver=solver,
            guide_scale=scale_pair(guide_scale), seed=resolve_seed(seed), noise_device=noise_device, inputs=inputs,
        )  # fmt: skip
        return self.run(request, offload_model=offload_model, **extras)
