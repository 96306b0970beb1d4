"""Coding in spatial tiles, for frames whose activations do not fit: memory follows the tile, not the frame.

Almost all of a VAE's memory lies outside its bottleneck, where frames are 64 or 256 times as large as latents. So the
bottleneck, whose attention looks at the whole frame, runs on the whole frame, and only what follows (of the decoder)
or comes before (of the encoder) is tiled: convolutions with a short reach. A tile differs from the whole frame within
that reach of its inner edges only, and there its neighbour is blended in. (Tiling the bottleneck too costs 15 to 20 dB
and saves next to nothing.) Time is never tiled: of every chunk of frames all tiles are computed before the next chunk,
and each tile has its own causal cache, so chunks come as from whole frames.

Letters: B batch, C channels, t latent frames, h, w latent height and width; T, H, W the same of a tile's result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from wan.engine.types import Tiling
from wan.modules.vae_blocks import FrameCache
from wan.modules.vae_sparse import ChunkEncoder, Stage, through

if TYPE_CHECKING:
    from wan.modules.vae import Decoder3d


def decode_tiled(decoder: Decoder3d, z: Tensor, frames_per_chunk: int, tiling: Tiling) -> Iterator[Tensor]:
    """Yield what `decoder` makes of z [B, C, t, h, w] in chunks of [B, C, T, H, W], the same as whole up to seams."""
    grid = Grid.over(z.shape[3], z.shape[4], tiling)
    streams = frames_per_chunk < z.shape[2]
    bottleneck_cache = FrameCache() if streams else None
    caches = [FrameCache() if streams else None for _ in grid.tiles]

    def grown(features: Tensor) -> Iterator[Tensor]:
        for tile, cache in zip(grid.tiles, caches, strict=True):
            with _at_hand(cache, features.device, tiling):
                yield decoder.grow(grid.crop(features, tile), cache)

    for part in z.split(frames_per_chunk, dim=2):
        yield grid.joined(grown(decoder.bottleneck(part, bottleneck_cache)))


def encode_tiled(
    shrink: Sequence[Stage],
    rest: Sequence[Stage],
    chunks: Iterable[Tensor | None],
    blank: Tensor,
    space: int,
    tiling: Tiling,
) -> Iterator[Tensor]:
    """Yield the output of the stages `shrink`, in tiles, then `rest`, whole, for chunks as `ChunkEncoder` takes them.

    A latent has `space` pixels a side.
    """
    grid = Grid.over(blank.shape[3] // space, blank.shape[4] // space, tiling)
    streams = [ChunkEncoder(shrink, grid.crop(blank, tile, space)) for tile in grid.tiles]
    cache = FrameCache()

    def shrunk(chunk: Tensor | None) -> Iterator[Tensor]:
        for tile, stream in zip(grid.tiles, streams, strict=True):
            with _at_hand(stream, blank.device, tiling):
                yield stream(None if chunk is None else grid.crop(chunk, tile, space))

    for chunk in chunks:
        yield through(rest, grid.joined(shrunk(chunk)), cache)


class _Memory(Protocol):
    """What a tile remembers of earlier frames."""

    def move(self, device: torch.device | str) -> None: ...


@contextmanager
def _at_hand(memory: _Memory | None, device: torch.device, tiling: Tiling) -> Iterator[None]:
    """`memory` on the device while its tile is computed, else parked in RAM if that is wanted."""
    if memory is None or not tiling.park:
        yield
        return
    memory.move(device)
    yield
    memory.move("cpu")


Tile = tuple[int, int]
"""Number of its row and of its column."""


@dataclass(frozen=True)
class Grid:
    """How a frame of latents is cut: the spans of `rows` and of `columns` in latent pixels, and what they share."""

    rows: list[slice]
    columns: list[slice]
    overlap: int

    @classmethod
    def over(cls, height: int, width: int, tiling: Tiling) -> Grid:
        return cls(cut(height, tiling), cut(width, tiling), tiling.overlap)

    @property
    def tiles(self) -> list[Tile]:
        return [(row, column) for row in range(len(self.rows)) for column in range(len(self.columns))]

    def crop(self, x: Tensor, tile: Tile, scale: int = 1) -> Tensor:
        """What a tile has of x [..., h * scale, w * scale]: a view."""
        row, column = tile
        return x[..., _scaled(self.rows[row], scale), _scaled(self.columns[column], scale)]

    def joined(self, tiles: Iterable[Tensor]) -> Tensor:
        """Whole frames [B, C, T, H, W] of all tiles in order, summed in float32; each is let go when the next comes."""
        frames: Tensor | None = None
        for tile, part in zip(self.tiles, tiles, strict=True):
            scale = part.shape[3] // (self.rows[0].stop - self.rows[0].start)
            if frames is None:
                height, width = self.rows[-1].stop * scale, self.columns[-1].stop * scale
                frames = torch.zeros(*part.shape[:3], height, width, device=part.device)
                weights = [blend(spans, self.overlap, scale) for spans in (self.rows, self.columns)]
            down, across = (each[index].to(part.device) for each, index in zip(weights, tile, strict=True))
            self.crop(frames, tile, scale).add_(part.float().mul_(down[:, None] * across))
        assert frames is not None
        return frames.to(part.dtype)


def cut(length: int, tiling: Tiling) -> list[slice]:
    """The fewest equal tiles that cover `length`, none longer than a tile, neighbours sharing at least the overlap.

    Tiles are made smaller rather than overlaps larger where they do not divide evenly: shared pixels are worked twice.
    """
    if length <= tiling.tile:
        return [slice(0, length)]
    count = -(-(length - tiling.overlap) // (tiling.tile - tiling.overlap))
    size = -(-(length + (count - 1) * tiling.overlap) // count)
    starts = [round(index * (length - size) / (count - 1)) for index in range(count)]
    return [slice(start, start + size) for start in starts]


def blend(spans: list[slice], overlap: int, scale: int) -> list[Tensor]:
    """Per span its weight at each of its pixels; at every pixel the weights of all spans add to 1.

    Linear over the middle half of the overlap, where both tiles are good: the outermost quarter, where a tile misses
    most of its surroundings, counts nothing.
    """
    total = torch.zeros(spans[-1].stop * scale)
    ramps = []
    for span in spans:
        pixels = torch.arange((span.stop - span.start) * scale) + 0.5
        rise = (pixels - overlap * scale / 4) / (overlap * scale / 2) if overlap else torch.ones_like(pixels)
        ramp = torch.ones_like(pixels)
        if span is not spans[0]:
            ramp = ramp.minimum(rise.clamp_min(0))
        if span is not spans[-1]:
            ramp = ramp.minimum(rise.flip(0).clamp_min(0))
        total[_scaled(span, scale)] += ramp
        ramps.append(ramp)
    return [ramp / total[_scaled(span, scale)] for span, ramp in zip(spans, ramps, strict=True)]


def _scaled(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)
