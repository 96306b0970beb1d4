"""Upstream's small helpers under upstream's names and signatures; `wan.video` does the writing.

One difference is meant: a failed save raises OutputError, where upstream prints a line and goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wan.conditioning.geometry import best_output_size
from wan.video import Output, merge_sound, open_sink

__all__ = [
    "best_output_size",
    "cache_image",
    "cache_video",
    "masks_like",
    "merge_video_audio",
    "rand_name",
    "save_image",
    "save_video",
    "str2bool",
]

_TRUE = {"yes", "true", "t", "y", "1"}
_FALSE = {"no", "false", "f", "n", "0"}
_GRID_PADDING = 2


def rand_name(length: int = 8, suffix: str = "") -> str:
    """`length` random bytes in hexadecimal, followed by `suffix`; its dot may be left out."""
    if suffix and not suffix.startswith("."):
        suffix = f".{suffix}"
    return secrets.token_hex(length) + suffix


def str2bool(v: bool | str) -> bool:
    """The truth of a command-line word: yes/true/t/y/1 or no/false/f/n/0 in any case."""
    if isinstance(v, bool):
        return v
    word = v.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is neither true nor false; use yes/true/t/y/1 or no/false/f/n/0")


def save_video(
    tensor: Tensor,
    save_file: str | os.PathLike[str] | None = None,
    fps: float = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    crf: int = 10,
) -> str:
    """Write videos [B, 3, T, H, W] side by side as one and return its path.

    Values are clamped to `value_range`, mapped to 0..1 (`normalize`) and truncated to 8 bits. Without `save_file` the
    name is a random one in the folder for temporary files. Raises OutputError.
    """
    path = Path(save_file) if save_file else Path(tempfile.gettempdir(), rand_name(suffix=suffix))
    with open_sink(Output(path, fps=fps, crf=crf)) as sink:
        for frame in tensor.unbind(2):
            grid = _grid(frame, nrow, normalize, value_range)
            sink.write_pixels((grid * 255).to(torch.uint8).permute(1, 2, 0)[None])
    return str(path)


def cache_video(
    tensor: Tensor,
    save_file: str | os.PathLike[str] | None = None,
    fps: float = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    retry: int = 5,
) -> str:
    """Wan 2.1's name of `save_video`. `retry` is accepted and unused: what failed once is reported at once."""
    return save_video(tensor, save_file, fps, suffix, nrow, normalize, value_range)


def save_image(
    tensor: Tensor,
    save_file: str | os.PathLike[str],
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
) -> str:
    """Write images [B, 3, H, W] side by side as one, rounded to 8 bits, and return its path. Raises OutputError.

    A name without an image's ending gets .png.
    """
    path = Path(save_file)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        path = path.with_name(path.name + ".png")
    grid = _grid(tensor, nrow, normalize, value_range)
    with open_sink(Output(path)) as sink:
        sink.write_pixels((grid * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)[None])
    return str(path)


def cache_image(
    tensor: Tensor,
    save_file: str | os.PathLike[str],
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    retry: int = 5,
) -> str:
    """Wan 2.1's name of `save_image`. `retry` is accepted and unused."""
    return save_image(tensor, save_file, nrow, normalize, value_range)


def masks_like(
    tensor: Sequence[Tensor], zero: bool = False, generator: torch.Generator | None = None, p: float = 0.2
) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of ones shaped like the latents [C, T, H, W]; with `zero` both are 0 in the first latent frame.

    With a `generator` (training) that happens to each item with probability `p`, and the first list then holds a
    small random noise level there instead of 0.
    """
    levels = [torch.ones_like(latents) for latents in tensor]
    masks = [torch.ones_like(latents) for latents in tensor]
    if zero:
        for level, mask in zip(levels, masks, strict=True):
            if generator is None:
                level[:, 0] = 0
                mask[:, 0] = 0
            elif torch.rand(1, generator=generator, device=generator.device).item() < p:
                noise = torch.normal(-3.5, 0.5, (1,), generator=generator, device=generator.device)
                level[:, 0] = noise.exp().to(level.device)
                mask[:, 0] = 0
    return levels, masks


def merge_video_audio(video_path: str | os.PathLike[str], audio_path: str | os.PathLike[str]) -> None:
    """Put the sound of `audio_path` into the video, in place; both end with the shorter one. Raises OutputError."""
    merge_sound(video_path, audio_path)


def _grid(images: Tensor, nrow: int, normalize: bool, value_range: tuple[float, float]) -> Tensor:
    """Images [B, 3, H, W] in rows of `nrow`, two black pixels apart; one image comes back as it is: [3, H', W']."""
    low, high = value_range
    images = images.float().clamp(low, high)
    if normalize:
        images = (images - low) / max(high - low, 1e-5)
    count, channels, height, width = images.shape
    if count == 1:
        return images[0]
    columns = min(nrow, count)
    rows = math.ceil(count / columns)
    step_y, step_x = height + _GRID_PADDING, width + _GRID_PADDING
    grid = images.new_zeros(channels, rows * step_y + _GRID_PADDING, columns * step_x + _GRID_PADDING)
    for index, image in enumerate(images):
        top = index // columns * step_y + _GRID_PADDING
        left = index % columns * step_x + _GRID_PADDING
        grid[:, top : top + height, left : left + width] = image
    return grid
