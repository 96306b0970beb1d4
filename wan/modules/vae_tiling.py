"""Decoding in spatial tiles, for frames whose activations do not fit: memory follows the tile, not the frame.

Almost all of a decoder's memory lies behind its bottleneck, where frames grow to 64 or 256 times the latent's pixels.
So the bottleneck, whose attention looks at the whole frame, runs on the whole frame, and only what follows is tiled:
convolutions with a short reach. A tile differs from the whole frame within that reach of its inner edges only, and
there its neighbour is blended in. (Tiling the bottleneck too costs 15 to 20 dB and saves next to nothing.) Time is
never tiled: of every chunk of frames all tiles are decoded before the next chunk, and each tile has its own causal
cache, so frames come chunk by chunk as from a whole decode.

Letters: B batch, C channels, t latent frames, h, w latent height and width; T, H, W the same of the decoder's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.engine.types import Tiling
from wan.modules.vae_blocks import FrameCache

if TYPE_CHECKING:
    from wan.modules.vae import Decoder3d


def decode_tiled(decoder: Decoder3d, z: Tensor, frames_per_chunk: int, tiling: Tiling) -> Iterator[Tensor]:
    """Yield what `decoder` makes of z [B, C, t, h, w] in chunks of [B, C, T, H, W], the same as whole up to seams."""
    rows, columns = (cut(length, tiling) for length in z.shape[3:])
    tiles = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    streams = frames_per_chunk < z.shape[2]
    bottleneck_cache = FrameCache() if streams else None
    caches = {tile: FrameCache() if streams else None for tile in tiles}
    for part in z.split(frames_per_chunk, dim=2):
        features = decoder.bottleneck(part, bottleneck_cache)
        frames = None
        for row, column in tiles:
            tile = features[..., rows[row], columns[column]].contiguous()
            pixels = _grow(decoder, tile, caches[row, column], tiling.park)
            scale = pixels.shape[3] // tile.shape[3]
            if frames is None:
                height, width = (side * scale for side in z.shape[3:])
                frames = pixels.new_zeros(*pixels.shape[:3], height, width, dtype=torch.float32)
                weights = [blend(spans, tiling.overlap, scale) for spans in (rows, columns)]
            down, across = (each[index].to(pixels.device) for each, index in zip(weights, (row, column), strict=True))
            place = frames[..., _scaled(rows[row], scale), _scaled(columns[column], scale)]
            place.add_(pixels.float().mul_(down[:, None] * across))
        yield frames.to(z.dtype)


def _grow(decoder: Decoder3d, tile: Tensor, cache: FrameCache | None, park: bool) -> Tensor:
    if cache is None or not park:
        return decoder.grow(tile, cache)
    cache.move(tile.device)
    pixels = decoder.grow(tile, cache)
    cache.move("cpu")
    return pixels


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
