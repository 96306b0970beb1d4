"""Upstream's image-to-video class, 2.1's (which looks at the image through CLIP) and 2.2's (two experts) by config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from wan.conditioning.image import ImageInputs, area_size, to_rgb
from wan.engine.errors import BadRequest
from wan.engine.types import Request
from wan.pipeline import WanPipeline, resolve_seed, scale_pair

if TYPE_CHECKING:
    from PIL.Image import Image

    from wan.modules.clip import CLIPModel


class WanI2V(WanPipeline):
    """Image to video. See `WanPipeline` for the constructor."""

    kind = "i2v"

    def generate(
        self,
        input_prompt: str,
        img: Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        last_frame: Image | None = None,
        size: tuple[int, int] | None = None,
        fit: str = "area",
        extend: int | None = None,
        extend_overlap: int = 1,
        noise_device: str | None = None,
        **extras: Any,
    ) -> Tensor | None:
        """A video [3, N, H, W] in -1..1 that begins with `img`, or None when a `sink` took the frames.

        Arguments are those of `WanT2V.generate`, but for the size: at most `max_area` pixels in the shape of `img`.
        With `fit` "crop", "pad" or "stretch" it is `size` (width, height) to the pixel. `last_frame`, of any size, is
        what the video ends with; of 2.1's models only those of `WanFLF2V` can follow one. With `extend` the video is
        made clip by clip of so many frames at most, each beginning with the last `extend_overlap` frames of the one
        before it, with the seeds from `seed` on. Raises BadRequest.
        """
        last = None if last_frame is None else to_rgb(last_frame)
        given = ImageInputs(first=to_rgb(img), last=last, fit=fit, extend=extend, extend_overlap=extend_overlap)
        if given.last is not None:
            self._check_last(frame_num)
        width, height = self.size_for(given.first, max_area, size, fit)
        request = Request(
            task=self.kind, prompt=input_prompt, negative_prompt=n_prompt or self.sample_neg_prompt, width=width,
            height=height, num_frames=frame_num, steps=sampling_steps, shift=shift, solver=sample_solver,
            guide_scale=scale_pair(guide_scale), seed=resolve_seed(seed), noise_device=noise_device, inputs=given,
        )  # fmt: skip
        return self.run(request, offload_model=offload_model, **extras)

    def size_for(self, img: Image, max_area: int, size: tuple[int, int] | None, fit: str) -> tuple[int, int]:
        """The (width, height) of the video that begins with `img`."""
        if fit == "area":
            area = max_area if size is None else size[0] * size[1]
            return area_size(img.width, img.height, area, stride=self.vae_stride, patch=self.patch_size)
        if size is None:
            raise BadRequest(f"fit={fit!r} fits the picture into size=(width, height), which is missing")
        return size

    def _check_last(self, frame_num: int) -> None:
        if frame_num < 5:
            raise BadRequest(f"{frame_num} frames between a first and a last one: at least 5 are needed")
        if "clip_checkpoint" in self.config and self.config.get("model_type", self.kind) != "flf2v":
            raise BadRequest(
                f"{self.config['__name__']!r} was trained with one picture; for a last frame use flf2v-14B or i2v-A14B"
            )

    @property
    def clip(self) -> CLIPModel:
        """Upstream's wrapper over the engine's CLIP: `.visual(videos)`, `.model`."""
        from wan.modules.clip import CLIPModel

        return CLIPModel.of(self.engine.network("clip"))

    @clip.setter
    def clip(self, value: Any) -> None:
        self.engine.placement.set("clip", getattr(value, "model", value))
