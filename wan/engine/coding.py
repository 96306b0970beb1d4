"""What encoding and decoding take of a card, in bytes and seconds, whole or in tiles: computed from sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wan.engine.roofline import (
    LIVE_TENSORS,
    LIVE_TENSORS_ENCODED,
    LIVE_TENSORS_GROUPED,
    PAGEABLE,
    VAE,
    Card,
    Conv,
    decoder,
    encoder,
    vae_bytes,
    vae_seconds,
)

Size = tuple[int, int, int]
"""Frames, height and width of a video."""
Tile = tuple[int, int]
"""Side and overlap of tiles, in latent pixels."""

DECODE_PIXELS = 8192
"""Latent pixels decoded at a time, as `wan.engine.decoding` has it."""


def latent(net: VAE, size: Size) -> Size:
    """Frames, rows and columns of the latents of a video."""
    time, side = net.stride
    return (size[0] - 1) // time + 1, size[1] // side, size[2] // side


def decoding(net: VAE, size: Size, card: Card, tile: Tile | None, at_a_time: int) -> tuple[int, float]:
    """(bytes, seconds) of decoding, `at_a_time` latent frames if that is not 0."""
    frames, rows, columns = latent(net, size)
    chunk = min(frames, at_a_time or max(1, DECODE_PIXELS // (rows * columns)))
    grid = _Grid.over(rows, columns, tile)
    part = list(decoder(net, frames, grid.height, grid.width))
    most = vae_bytes(net, part, chunk, LIVE_TENSORS)
    return _tiled(net, size, card, (grid, part, chunk), most)


def encoding(net: VAE, size: Size, card: Card, tile: Tile | None) -> tuple[int, float]:
    """(bytes, seconds) of encoding a whole video."""
    frames, rows, columns = latent(net, size)
    grid, side = _Grid.over(rows, columns, tile), net.stride[1]
    part = list(encoder(net, size[0], grid.height * side, grid.width * side))
    most = vae_bytes(net, part, 1, LIVE_TENSORS_GROUPED if net.grouped else LIVE_TENSORS_ENCODED)
    return _tiled(net, size, card, (grid, part, 1), most)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The tiles of a frame: how many, and their size in latent pixels."""

    tiles: int
    height: int
    width: int

    @classmethod
    def over(cls, rows: int, columns: int, tile: Tile | None) -> _Grid:
        if tile is None:
            return cls(tiles=1, height=rows, width=columns)
        (down, height), (across, width) = (_cut(side, *tile) for side in (rows, columns))
        return cls(tiles=down * across, height=height, width=width)


def _tiled(net: VAE, size: Size, card: Card, work: tuple[_Grid, list[Conv], int], one: int) -> tuple[int, float]:
    """(bytes, seconds) of a pass over all tiles, where one takes `one` and goes through these convolutions.

    What a tile remembers waits in RAM while others compute. The bottleneck sees whole frames, and the joined ones are
    float32.
    """
    grid, part, chunk = work
    frames, rows, columns = latent(net, size)
    seconds = grid.tiles * vae_seconds(net, part, frames, grid.height * grid.width, card)
    if grid.tiles == 1:
        return one, seconds
    parked = sum(conv.kept for conv in part) * net.element_size
    bottleneck = 8 * net.element_size * net.decoder_dim * net.dim_mult[-1] * rows * columns
    joined = 4 * 3 * size[1] * size[2] * chunk * net.stride[0]
    copies = 2 * grid.tiles * parked * math.ceil(frames / chunk) / PAGEABLE
    return one + bottleneck + joined, seconds + copies


def _cut(length: int, tile: int, overlap: int) -> tuple[int, int]:
    """(number, length) of the tiles that cover `length`."""
    if length <= tile:
        return 1, length
    count = -(-(length - overlap) // (tile - overlap))
    return count, -(-(length + (count - 1) * overlap) // count)
