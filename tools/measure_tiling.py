"""Prints what decoding in tiles costs in quality (demo VAE, rendered scenes) and saves in memory (published VAEs).

python tools/measure_tiling.py
"""

from __future__ import annotations

import gc
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo import scenes  # noqa: E402

from wan.engine.types import Tiling  # noqa: E402
from wan.modules.vae import WanVAEModel, load_vae  # noqa: E402
from wan.modules.vae_blocks import FrameCache  # noqa: E402
from wan.modules.vae_config import VAE_2_1, VAE_2_2  # noqa: E402
from wan.modules.vae_tiling import cut  # noqa: E402

SETTINGS = [(16, 8), (16, 4), (16, 2), (16, 0)]
SIZES = [
    ("2.1", VAE_2_1, "832x480", 60, 104),
    ("2.1", VAE_2_1, "1280x720", 90, 160),
    ("2.2", VAE_2_2, "1280x704", 44, 80),
]


def four_scenes(seed: int) -> Tensor:
    """[1, 3, 9, 160, 192]: four clips of the demo's world side by side."""
    rng = random.Random(seed)
    combos = rng.sample(scenes.split_combos()["train"], 4)
    clips = scenes.render([scenes.random_scene(rng, combo) for combo in combos])[:, :, :9]
    rows = [torch.cat(list(clips[pair]), dim=3) for pair in (slice(0, 2), slice(2, 4))]
    return torch.cat(rows, dim=2)[None, :, :, :160]


@torch.inference_mode()
def quality(seeds: range) -> None:
    """Tiles of 16 latent pixels in frames of 24x20: PSNR to whole frames, mean and worst, and the largest error."""
    vae = load_vae(ROOT / "demo" / "Wan2.1_VAE.pth", torch.float32)
    found: dict[tuple[int, int], list[tuple[float, float]]] = {each: [] for each in SETTINGS}
    for seed in seeds:
        latents = vae.encode(four_scenes(seed), frames_per_chunk=None)
        whole = vae.decode(latents).clamp(-1, 1)
        for tile, overlap in SETTINGS:
            parts = list(vae.decode_chunks(latents, tiling=Tiling(tile=tile, overlap=overlap)))
            error = torch.cat(parts, dim=2).clamp(-1, 1) - whole
            decibels = 10 * torch.log10(4 / error.square().mean())
            found[tile, overlap].append((decibels.item(), error.abs().max().item()))
    for (tile, overlap), values in found.items():
        decibels, largest = zip(*values, strict=True)
        mean = sum(decibels) / len(decibels)
        print(f"tile {tile} overlap {overlap}: {mean:.1f} dB (worst {min(decibels):.1f}), max {max(largest):.4f}")


class Largest(TorchDispatchMode):
    """The elements of the largest tensor any operation makes, but for a matrix of attention scores.

    The meta device shows one of [tokens, tokens]; kernels on real devices keep none.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.scores = (tokens, tokens)
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-2:] != self.scores:
            self.elements = max(self.elements, out.numel())
        return out


@torch.no_grad()
def memory() -> None:
    """Largest activation, and what is remembered of earlier frames, in GB of float32; nothing is computed."""
    for name, config, size, height, width in SIZES:
        with torch.device("meta"):
            model = WanVAEModel(config)
            latents = torch.empty(1, config.z_dim, 2, height, width)
        for tiling in (None, Tiling(park=False), Tiling(tile=16, overlap=4, park=False)):
            gc.collect()  # caches of the size before
            remembered: list[int] = []
            with Largest(height * width) as largest:
                for _ in model.decode_chunks(latents, tiling=tiling):
                    remembered = [
                        4 * sum(frames.numel() for frames in each.values())
                        for each in gc.get_objects()
                        if type(each) is FrameCache
                    ]
            sides = [len(cut(side, tiling)) for side in (height, width)] if tiling else [1, 1]
            what = f"tile {tiling.tile} overlap {tiling.overlap}" if tiling else "whole"
            print(
                f"VAE {name} {size} {what}, {sides[0]}x{sides[1]} tiles: largest {4e-9 * largest.elements:.2f}, "
                f"remembered {1e-9 * sum(remembered):.1f} in all, {1e-9 * max(remembered):.2f} by one tile"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    quality(range(1, 9))
    memory()
