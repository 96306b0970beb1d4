"""The noise a benchmarked run begins with: drawn on the CPU, the same on every machine, or read from a file.

Benchmarks that compare pictures between programs publish their noise, as each program draws it in its own way.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from wan.engine.errors import BadRequest
from wan.engine.types import Denoising


def read_noise(path: Path) -> Tensor:
    """Float32 latents [1, C, T, H, W] from a .safetensors, .npy or .pt file with one tensor. Raises BadRequest."""
    flag = f"--noise_file {str(path)!r}"
    try:
        noise = _read(path)
    except Exception as error:  # each reader has its own
        raise BadRequest(f"{flag} cannot be read ({error}); give a .safetensors, .npy or .pt file") from error
    noise = noise[None] if noise.ndim == 4 else noise
    if noise.ndim != 5 or noise.shape[0] != 1 or not noise.is_floating_point():
        raise BadRequest(
            f"{flag} holds {tuple(noise.shape)} of {noise.dtype}: latents are [C, T, H, W] of a float type"
        )
    return noise.float()


def _read(path: Path) -> Tensor:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        (noise,) = load_file(path).values()
        return noise
    if path.suffix == ".npy":
        import numpy as np

        return torch.from_numpy(np.load(path, allow_pickle=False))
    noise = torch.load(path, map_location="cpu", weights_only=True)
    return noise if isinstance(noise, Tensor) else next(iter(noise.values()))


class Start:
    """A `Keeper` that keeps nothing but what a denoise began with, and puts `noise` in place of what was drawn."""

    def __init__(self, noise: Tensor | None) -> None:
        self.noise = noise
        self.latents: Tensor | None = None

    def finished(self, shot: int) -> Tensor | None:
        return None

    def restore(self, run: Denoising) -> None:
        """Raises BadRequest where the file's noise is of another shape."""
        if self.noise is not None:
            if self.noise.shape != run.latents.shape:
                asked, given = tuple(run.latents.shape[1:]), tuple(self.noise.shape[1:])
                raise BadRequest(f"--noise_file holds latents {given}; this size and length need {asked}")
            noise = self.noise.to(run.latents.device)
            run.latents = noise if run.shot.known is None else run.shot.known.apply(noise, None)
        if self.latents is None:
            self.latents = run.latents

    def stepped(self, run: Denoising, resumable: bool) -> None: ...

    def denoised(self, run: Denoising) -> None: ...
