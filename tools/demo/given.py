"""Given frames, as image-to-video sees them: what the DiT is shown beside the noisy latents, and captions that leave
the object to the picture.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from wan.conditioning.image import known_mask

from . import scenes
from .vae import Params, normalized_latents

CHANNELS = 20  # 4 of the mask, 16 of the latents
LAST_TOO = 0.25  # share of clips whose last frame is given as well
UNNAMED = 0.5  # share of captions that say only what happens


def channels(vae: Params, video: Tensor, known: tuple[int, ...]) -> Tensor:
    """[20, T, h, w] of a clip [3, F, H, W]: the mask of its `known` frames and the latents of them amid grey.

    A second statement of `wan.conditioning.image.image_channels`, with the encoder that training has at hand.
    """
    shown = torch.zeros_like(video)
    shown[:, list(known)] = video[:, list(known)]
    latents = normalized_latents(vae, shown[None])[0]
    return torch.cat([known_mask(known, video.shape[1], *latents.shape[2:]), latents])


def draw_channels(vae: Params, video: Tensor, rng: random.Random) -> Tensor:
    """The first frame given, now and then the last one too."""
    last = video.shape[1] - 1
    return channels(vae, video, (0, last) if rng.random() < LAST_TOO else (0,))


def draw_caption(scene: scenes.Scene, rng: random.Random) -> str:
    """A full caption, or one that does not name the object."""
    return scenes.event(scene, rng) if rng.random() < UNNAMED else scenes.caption(scene, rng)
