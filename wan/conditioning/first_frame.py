"""A picture as the first frame of a video, for models that are given its latents and sample the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.conditioning.image import pixels_of, to_rgb
from wan.engine.types import Encoders, Known

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["cover", "known_first_frame"]


def cover(image: Image, width: int, height: int) -> Tensor:
    """float32 [3, 1, height, width] in -1..1: the picture scaled to cover the size (Lanczos), cut at the centre."""
    from PIL.Image import Resampling

    scale = max(width / image.width, height / image.height)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    scaled = to_rgb(image).resize(size, Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return pixels_of(scaled.crop((left, top, left + width, top + height)))[:, None]


def known_first_frame(encoders: Encoders, frame: Tensor, latent_shape: tuple[int, int, int, int]) -> Known:
    """Latents of `frame` [3, 1, H, W], known in the first latent frame of `latent_shape` (C, T, h, w)."""
    with encoders.use("vae") as vae:
        latents = vae.encode(frame[None].to(next(vae.parameters())), tiling=encoders.tiling)
    latents = latents.to(encoders.device, torch.float32)
    channels, count, rows, columns = latent_shape
    whole = latents.new_zeros(1, channels, count, rows, columns)
    whole[:, :, :1] = latents
    mask = latents.new_zeros(1, 1, count, rows, columns)
    mask[:, :, 0] = 1
    return Known(latents=whole, mask=mask)
