"""What encoding and decoding take of a card, in bytes and seconds, whole or in tiles: computed from sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from wan.engine.roofline import (
    LIVE_DECODING,
    LIVE_ENCODING,
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


class Tile(NamedTuple):
    """How frames are cut: side and overlap of tiles, in latent pixels, and whether what one remembers waits in RAM."""

    side: int
    overlap: int
    parked: bool


DECODE_PIXELS = 8192
"""Latent pixels decoded at a time, where nothing says how many frames: small videos go in one piece, which is several
times faster on a CPU; at 480p it is one latent frame, as upstream. The VAE's result does not depend on it."""


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
    # Of tiles: the bottleneck sees whole frames, and the joined ones are float32.
    whole = 8 * net.element_size * net.decoder_dim * net.dim_mult[-1] * rows * columns
    whole += 4 * 3 * size[1] * size[2] * chunk * net.stride[0]
    most = vae_bytes(net, part, chunk, LIVE_DECODING[net.grouped]) + (whole if grid.tiles > 1 else 0)
    return grid.taken(net, card, part, (frames, chunk), most)


def encoding(net: VAE, size: Size, card: Card, tile: Tile | None) -> tuple[int, float]:
    """(bytes, seconds) of encoding a whole video."""
    frames, rows, columns = latent(net, size)
    grid, side = _Grid.over(rows, columns, tile), net.stride[1]
    part = list(encoder(net, size[0], grid.height * side, grid.width * side))
    # Of tiles: what they give is joined in float32, and the bottleneck sees all of it.
    whole = (4 + 8 * net.element_size) * net.encoder_dim * net.dim_mult[-1] * rows * columns
    most = vae_bytes(net, part, 1, LIVE_ENCODING[net.grouped]) + (whole if grid.tiles > 1 else 0)
    return grid.taken(net, card, part, (frames, 1), most)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The tiles of a frame: how many, their size in latent pixels, whether they take turns in holding the past."""

    tiles: int
    height: int
    width: int
    parked: bool

    @classmethod
    def over(cls, rows: int, columns: int, tile: Tile | None) -> _Grid:
        if tile is None:
            return cls(tiles=1, height=rows, width=columns, parked=False)
        (down, height), (across, width) = (_cut(side, tile.side, tile.overlap) for side in (rows, columns))
        return cls(tiles=down * across, height=height, width=width, parked=tile.parked)

    def taken(self, net: VAE, card: Card, part: list[Conv], work: tuple[int, int], one: int) -> tuple[int, float]:
        """(bytes, seconds) of all tiles, each through these convolutions, where one alone takes `one` bytes.

        `work`: latent frames, and how many at a time. What a tile remembers waits in RAM or stays.
        """
        frames, chunk = work
        seconds = self.tiles * vae_seconds(net, part, frames, self.height * self.width, card)
        past = net.element_size * sum(conv.kept for conv in part)
        if self.tiles == 1 or not self.parked:
            return one + (self.tiles - 1) * past, seconds
        return one, seconds + 2 * self.tiles * past * math.ceil(frames / chunk) / PAGEABLE


def _cut(length: int, tile: int, overlap: int) -> tuple[int, int]:
    """(number, length) of the tiles that cover `length`."""
    if length <= tile:
        return 1, length
    count = -(-(length - overlap) // (tile - overlap))
    return count, -(-(length + (count - 1) * overlap) // count)
