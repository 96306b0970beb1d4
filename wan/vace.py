"""Upstream's VACE class, Wan 2.1: video from references, from a control video, inside or around a mask."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.control import check_control, on_canvas, shape_of
from wan.conditioning.image import load_image, pixels_of
from wan.conditioning.processor import VaceVideoProcessor
from wan.conditioning.video import Clip, open_control
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.types import Request
from wan.families.vace import VaceInputs
from wan.pipeline import WanPipeline, resolve_seed, scale_pair

Place = str | os.PathLike[str]


class WanVace(WanPipeline):
    """Video guided by pictures, by another video, or made inside a mask. See `WanPipeline` for the constructor."""

    kind = "vace"

    @property
    def vid_proc(self) -> VaceVideoProcessor:
        """Upstream's reader of videos, with its budget for 1280x720."""
        step = [stride * patch for stride, patch in zip(self.vae_stride, self.patch_size, strict=True)]
        fps = self.config.sample_fps
        return VaceVideoProcessor(
            downsample=(step[0], step[1], step[2]), min_area=720 * 1280, max_area=720 * 1280, min_fps=fps, max_fps=fps,
            zero_start=True, seq_len=75600, keep_last=True,
        )  # fmt: skip

    def prepare_source(
        self,
        src_video: Sequence[Place | None],
        src_mask: Sequence[Place | None],
        src_ref_images: Sequence[Sequence[Place] | None],
        num_frames: int,
        image_size: tuple[int, int],
        device: str | torch.device,
        *,
        stream: bool = False,
    ) -> tuple[list[Any], list[Any], list[list[Tensor] | None]]:
        """(videos [3, T, H, W], masks [1 or 3, T, H, W], reference images [3, 1, H, W] of each) for `generate`.

        Each list has an entry per video, paths or None. `image_size` (width, height) is a video's size where there is
        no source, else its area, and `num_frames` the same for its length: a source keeps its shape and its frames are
        spread over its duration. Without a source the video is grey; without a mask all is made anew. With `stream`
        the files are read while they are encoded (`wan.conditioning.video.Clip`) and never held. Raises BadRequest.
        """
        videos: list[Any] = []
        masks: list[Any] = []
        refs: list[list[Tensor] | None] = []
        for video, mask, images in zip(src_video, src_mask, src_ref_images, strict=True):
            frames, cut = _source(video, mask, num_frames, image_size)
            size = tuple(frames.shape[2:])
            videos.append(frames if stream else _held(frames, device))
            masks.append(cut if stream else torch.ones_like(videos[-1]) if cut is None else _held(cut, device))
            pictures = [_picture(path, size).to(device) for path in images or ()]
            refs.append(None if images is None else pictures)
        return videos, masks, refs

    def generate(
        self, input_prompt: str, input_frames: Sequence[Tensor | Clip], input_masks: Sequence[Tensor | Clip | None],
        input_ref_images: Sequence[Sequence[Tensor] | None], size: tuple[int, int] = (1280, 720), frame_num: int = 81,
        context_scale: float = 1.0, shift: float = 5.0, sample_solver: str = "unipc", sampling_steps: int = 50,
        guide_scale: float | tuple[float, float] = 5.0, n_prompt: str = "", seed: int = -1, offload_model: bool = True,
        *, noise_device: str | None = None, **extras: Any,
    ) -> Tensor | None:  # fmt: skip
        """A video [3, N, H, W] in -1..1, or None when a `sink` took the frames.

        The first three lists are what `prepare_source` returns for one video, which also decides size and length:
        `size` and `frame_num` are upstream's and unused. `context_scale` is how strongly the sources act; the rest is
        as in `WanT2V.generate`. Raises BadRequest.
        """
        if not len(input_frames) == len(input_masks) == len(input_ref_images) == 1:
            raise BadRequest(
                f"{len(input_frames)} videos, {len(input_masks)} masks and {len(input_ref_images)} lists of reference "
                "images: generate makes one video at a time, give lists of one entry"
            )
        frames, mask, refs = input_frames[0], input_masks[0], tuple(input_ref_images[0] or ())
        num_frames, height, width = shape_of(frames)
        check_control(frames, mask, refs, shape_of(frames))
        request = Request(
            task="vace", prompt=input_prompt, negative_prompt=n_prompt or self.sample_neg_prompt, height=height,
            width=width, num_frames=num_frames, steps=sampling_steps, shift=shift, solver=sample_solver,
            guide_scale=scale_pair(guide_scale), seed=resolve_seed(seed), noise_device=noise_device,
            inputs=VaceInputs(frames=frames, mask=mask, refs=refs, context_scale=context_scale),
        )  # fmt: skip
        return self.run(request, offload_model=offload_model, **extras)


class WanVaceMP(WanVace):
    """Upstream's name for VACE on all GPUs of a machine: here on one; frames come on the CPU, as upstream's do."""

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path | None,
        use_usp: bool = False,
        ulysses_size: int | None = None,
        ring_size: int | None = None,
        **options: Any,
    ) -> None:
        for name, size in (("ulysses_size", ulysses_size), ("ring_size", ring_size)):
            if size not in (None, 1):
                raise IncompatibleOptions(
                    f"{name}={size!r} needs several GPUs, which this version cannot use yet; use 1"
                )
        super().__init__(config, checkpoint_dir, use_usp=use_usp, **options)

    def run(self, *arguments: Any, **named: Any) -> Tensor | None:
        video = super().run(*arguments, **named)
        return None if video is None else video.cpu()


def _source(
    video: Place | None, mask: Place | None, num_frames: int, size: tuple[int, int]
) -> tuple[Tensor | Clip, Clip | None]:
    """What is read of a video and its mask; without a video a grey one that takes no memory."""
    if video is not None:
        return open_control(video, mask, num_frames, size)
    if mask is not None:
        raise BadRequest(f"--src_mask {os.fspath(mask)!r} needs a video to lie on: pass --src_video, or leave it out")
    return torch.zeros(()).expand(3, num_frames, size[1], size[0]), None


def _picture(path: Place, size: tuple[int, ...]) -> Tensor:
    """A reference image [3, 1, H, W] at the video's (height, width)."""
    return on_canvas(pixels_of(load_image(path, "--src_ref_images"))[:, None], *size)


def _held(video: Tensor | Clip, device: str | torch.device) -> Tensor:
    """All of it on the device, free to be changed."""
    return video.tensor().to(device) if isinstance(video, Clip) else video.clone().to(device)
