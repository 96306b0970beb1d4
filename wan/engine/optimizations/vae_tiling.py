"""Coding in spatial tiles, for cards on which whole frames do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Optimization, Order
from wan.engine.types import Tiling

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class VAETiling(Optimization):
    """Decode and encode each group of frames in overlapping tiles: memory follows the tile instead of the frame.

    Tiles are cut in space only, each remembers its own earlier frames, and neighbours are blended, so there are no
    seams in time and none to see in space: with the default overlap of 8, frames of the demo model's VAE have a PSNR of
    at least 70 dB to whole ones, smooth gradients and saturated colours included (`docs/benchmarks/`). What fits into
    one tile is coded whole, bit for bit. Pixels that tiles share are computed twice. What tiles remember waits in
    RAM, in float32 about 15 GB at 720p (VAE 2.1), and crosses the bus with every group of frames;
    `--no-vae_tile_park` keeps it on the GPU, where it needs more than a whole frame's. A latent pixel is 8 pixels of
    the video (VAE 2.1) or 16 (VAE 2.2).
    """

    order = Order.PLACEMENT
    grade = "lossy"
    tolerance = 1e-2
    cost = "what tiles share is computed twice; their memory waits in RAM and crosses the bus"
    per_call = True
    vae_tiling: bool = option(False, "decode and encode frames in overlapping tiles, to save memory")
    vae_tile_size: int = option(32, "side of a tile, in latent pixels")
    vae_tile_overlap: int = option(8, "latent pixels that neighbouring tiles share")
    vae_tile_park: bool = option(True, "keep what tiles remember of earlier frames in RAM")

    @property
    def tiling(self) -> Tiling:
        """The tiles. Raises BadRequest."""
        return Tiling(tile=self.vae_tile_size, overlap=self.vae_tile_overlap, park=self.vae_tile_park)

    def check(self, hardware: Hardware) -> None:
        """Raise BadRequest where tiles would be smaller than what they share."""
        _ = self.tiling

    def apply(self, engine: Engine) -> None:
        engine.set_tiling(self.tiling)
