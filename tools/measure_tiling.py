"""Prints what coding in tiles and in half precision costs in quality (demo VAE) and saves in memory (published VAEs).

python tools/measure_tiling.py
"""

from __future__ import annotations

import gc
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo import scenes  # noqa: E402

from wan.engine.optimizations import VAEPrecision  # noqa: E402
from wan.engine.types import Tiling  # noqa: E402
from wan.modules.vae import WanVAEModel, load_vae  # noqa: E402
from wan.modules.vae_blocks import FrameCache  # noqa: E402
from wan.modules.vae_config import VAE_2_1, VAE_2_2  # noqa: E402
from wan.modules.vae_tiling import cut  # noqa: E402

OVERLAPS = (0, 2, 4, 6, 8)
COLOURS = {"red": (1.0, -1.0, -1.0), "cyan": (-1.0, 1.0, 1.0)}
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


def pictures() -> dict[str, Tensor]:
    """[1, 3, T, 160, 192]: scenes, and what seams show most on: ramps, and flat colours at the end of the range."""
    down, across = torch.linspace(-1, 1, 160)[:, None].expand(160, 192), torch.linspace(-1, 1, 192).expand(160, 192)
    flat = {name: torch.tensor(rgb).view(1, 3, 1, 1, 1).expand(1, 3, 1, 160, 192) for name, rgb in COLOURS.items()}
    scenes = {f"scenes {seed}": four_scenes(seed) for seed in range(1, 9)}
    return {**scenes, "ramps": torch.stack([across, down, -across])[None, :, None], **flat}


def decibels(value: Tensor, reference: Tensor) -> float:
    """PSNR; values span 2."""
    return float(10 * torch.log10(4 / (value - reference).square().mean()))


def worst_seam(frames: Tensor, whole: Tensor) -> float:
    """The largest step from a column or row of pixels to the next, in what it and the 16 around it are in `whole`.

    Steps below half a level of 8 bits count as that.
    """
    worst = 0.0
    for dim in (3, 4):
        others = [each for each in range(5) if each != dim]
        step, plain = (each.diff(dim=dim).abs().mean(dim=others) for each in (frames, whole))
        around = avg_pool1d(plain[None], 17, 1, 8, count_include_pad=False)[0]
        worst = max(worst, float((step / plain.maximum(around).clamp_min(1 / 255)).max()))
    return worst


@torch.inference_mode()
def quality() -> None:
    """Tiles of 16 latent pixels in frames of 24x20: of each kind of picture the worst PSNR, error and seam."""
    vae = load_vae(ROOT / "demo" / "Wan2.1_VAE.pth", torch.float32)
    found: dict[tuple[str, str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for name, video in pictures().items():
        latents = vae.encode(video, frames_per_chunk=None)
        whole = vae.decode(latents, frames_per_chunk=None)
        for overlap in OVERLAPS:
            tiling = Tiling(tile=16, overlap=overlap)
            decoded = torch.cat(list(vae.decode_chunks(latents, tiling=tiling)), dim=2)
            encoded = vae.decode(vae.encode(video, tiling=tiling), frames_per_chunk=None)
            for what, frames in (("decoded", decoded), ("encoded", encoded)):
                error = float((frames - whole).abs().max())
                key = what, name.split()[0], overlap
                found[key].append((decibels(frames, whole), error, worst_seam(frames, whole)))
    for (what, name, overlap), values in sorted(found.items()):
        psnr, errors, seams = zip(*values, strict=True)
        print(f"{what} {name} overlap {overlap}: {min(psnr):.1f} dB, max {max(errors):.4f}, seam {max(seams):.3f}")


@torch.inference_mode()
def precision() -> None:
    """Of rendered scenes, decoded and encoded in half precision: the worst PSNR to float32, and the largest error."""
    path = ROOT / "demo" / "Wan2.1_VAE.pth"
    plain = load_vae(path, torch.float32)
    for dtype in ("bf16", "fp16"):
        half = load_vae(path, torch.float32)
        VAEPrecision(vae_dtype=dtype).convert(half, "vae")
        found: dict[str, list[tuple[float, float]]] = {"decoded": [], "encoded": []}
        for seed in range(1, 4):
            video = four_scenes(seed)
            latents = plain.encode(video, frames_per_chunk=None)
            whole = plain.decode(latents, frames_per_chunk=None)
            again = plain.decode(half.encode(video).float(), frames_per_chunk=None)
            for what, frames in (("decoded", half.decode(latents).float()), ("encoded", again)):
                found[what].append((decibels(frames, whole), float((frames - whole).abs().max())))
        for what, values in found.items():
            psnr, errors = zip(*values, strict=True)
            print(f"{dtype} {what}: {min(psnr):.1f} dB, max {max(errors):.4f}")


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
            pixels = torch.empty(1, 3, 4, *(side * model.stride[1] for side in (height, width)))
        for tiling in (None, Tiling(park=False), Tiling(tile=16, overlap=4, park=False)):
            sides = [len(cut(side, tiling)) for side in (height, width)] if tiling else [1, 1]
            what = f"tile {tiling.tile} overlap {tiling.overlap}" if tiling else "whole"
            print(f"VAE {name} {size} {what}, {sides[0]}x{sides[1]} tiles")
            for way, parts in (
                ("decode", model.decode_chunks(latents, tiling=tiling)),
                ("encode", model.encode_stream([pixels[:, :, :1], pixels], pixels, tiling=tiling)),
            ):
                counted(way, parts, height * width)


def counted(way: str, parts: Iterator[Tensor], tokens: int) -> None:
    gc.collect()  # caches of the size before
    remembered: list[int] = []
    with Largest(tokens) as largest:
        for _ in parts:
            remembered = [
                4 * sum(frames.numel() for frames in each.values())
                for each in gc.get_objects()
                if type(each) is FrameCache
            ]
    print(
        f"  {way}: largest {4e-9 * largest.elements:.2f}, remembered {1e-9 * sum(remembered):.1f} in all, "
        f"{1e-9 * max(remembered):.2f} by one tile"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    quality()
    precision()
    memory()
