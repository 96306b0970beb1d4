"""What a card can do and what a network asks of it: FLOP, bytes and seconds, computed from sizes and never measured.

A planner compares ways to run with these numbers before a weight is read, so they are plain arithmetic without torch.
Rates are those of the makers' data sheets (dense, accumulating in float32); a share says how much of each a good
kernel is taken to reach. 1 multiply-add is 2 FLOP; GB is 10^9 bytes.

Letters: L tokens, D width, T/h/w latent frames, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

GB = 10**9
TERA = 1e12

# Shares of the data sheet that are taken as reachable.
GEMM, ATTENTION, CROSS_ATTENTION, CONV, TF32, HBM, PCIE = 0.74, 0.66, 0.5, 0.40, 0.50, 0.78, 0.78

PAGEABLE = 4e9
"""Bytes a second between GPU and memory that is not pinned; assumed."""
CPU_FLOPS = 0.5e12
"""A CPU's bfloat16 matrix products; assumed."""
LAUNCH_S, COMPILED_LAUNCH_S = 450e-6, 90e-6
"""Time the host needs to launch a block's kernels; assumed."""
EAGER_PASSES, COMPILED_PASSES = 250, 48
"""Bytes a block moves beside its matrix products, per token and channel: counted on the operations; 4 F/D more for
the GELU."""
LIVE_DECODING, LIVE_ENCODING = (4.55, 4.05), (4.5, 5.85)
"""Tensors of the widest layer that are alive at once while a VAE decodes or encodes, without and with shortcuts around
groups of layers: `tests/engine/test_coding.py` counts them on the operations."""
VAE_PASSES = 28
"""How often each value that enters a convolution is read or written in eager mode; counted on the operations."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A graphics card: bytes, FLOP a second and bytes a second as its data sheet says. `fp8` 0: it has none."""

    name: str
    memory: int
    bf16: float
    fp8: float
    tf32: float
    hbm: float
    pcie: float
    source: str = "data sheet"

    @property
    def copy_rate(self) -> float:
        """Bytes a second from pinned memory."""
        return PCIE * self.pcie


def _card(name: str, gib: float, bf16: float, fp8: float, tf32: float, hbm: float, pcie: float = 32) -> Card:
    """Rates in TFLOP/s and GB/s, PCIe per direction: 64 is generation 5, 32 generation 4, 16 lanes."""
    return Card(
        name=name, memory=int(gib * 2**30), bf16=bf16 * TERA, fp8=fp8 * TERA, tf32=tf32 * TERA, hbm=hbm * GB,
        pcie=pcie * GB,
    )  # fmt: skip


CARDS = (
    _card("H200", 140, 989, 1979, 495, 4800, 64),
    _card("H100", 79, 989, 1979, 495, 3350, 64),
    _card("A100 80GB", 79, 312, 0, 156, 2039),
    _card("A100 40GB", 39, 312, 0, 156, 1555),
    _card("L40S", 44, 362, 733, 183, 864),
    _card("A6000", 47, 155, 0, 77, 768),
    _card("L4", 22, 121, 242, 60, 300),
    _card("RTX 5090", 31, 209, 419, 105, 1792, 64),
    _card("RTX 4090", 23.5, 165, 330, 83, 1008),
    _card("RTX 3090", 23.5, 71, 0, 36, 936),
    _card("RTX 3060", 11.6, 25.6, 0, 12.8, 360),
)
"""By name as CUDA says it, without the maker's; memory as CUDA reports it, rounded down."""


def card_of(name: str, memory: int) -> Card:
    """The card CUDA calls `name`, with the memory it has; of an unknown one, the rates of the nearest by memory."""
    words = name.replace("-", " ").split()
    known = [card for card in CARDS if _says(words, card.name.split())]
    nearest = min(known or CARDS, key=lambda card: abs(card.memory - memory))
    source = nearest.source if known else f"unknown card, rates of {nearest.name} assumed"
    return Card(**{**vars(nearest), "name": name, "memory": memory, "source": source})


def card_for(budget: int) -> Card:
    """The card to plan for where there is none: the smallest that has `budget` bytes, else the largest."""
    return min((card for card in CARDS if card.memory >= 0.9 * budget), key=lambda card: card.memory, default=CARDS[0])


def _says(words: list[str], card: list[str]) -> bool:
    """ "NVIDIA A100 SXM4 80GB" says A100 80GB; "NVIDIA RTX A6000" says A6000, and "L40S" does not say L4."""
    return all(word in words for word in card)


# The transformer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of one expert. `num_blocks` counts side blocks too; `block_bytes` is a block's share of `num_bytes`.

    `blocks_bytes` are those of all that can be swapped, smaller ones among them, and None where all are alike.
    `side_streams` are residual streams beside the main one. `coded` weights are kept in 8 bits: made anew for every
    forward, or, `scaled`, multiplied so.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_blocks: int
    in_channels: int
    out_channels: int
    text_len: int
    text_dim: int
    num_bytes: int
    block_bytes: int
    blocks_bytes: tuple[int, ...] | None = None
    image_tokens: int = 0
    side_streams: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    element_size: int = 2
    coded: int = 0
    scaled: bool = False

    @property
    def swappable(self) -> int:
        """How many blocks can be swapped."""
        return self.num_blocks if self.blocks_bytes is None else len(self.blocks_bytes)

    @property
    def swapped_bytes(self) -> float:
        """Bytes of a swapped block on average: they are spread evenly."""
        return self.block_bytes if self.blocks_bytes is None else sum(self.blocks_bytes) / len(self.blocks_bytes)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """FLOP of one forward of one sample, and the bytes its element-wise parts move."""

    linear: float
    attention: float
    cross_attention: float
    moved_bytes: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.cross_attention


def forward(net: Transformer, tokens: int, *, compiled: bool = False) -> Forward:
    """What one forward over `tokens` takes."""
    d, f, n, seen = net.dim, net.ffn_dim, net.num_blocks, net.text_len + net.image_tokens
    ends = math.prod(net.patch) * (net.in_channels + net.out_channels)
    context = 4 * n * seen * d * d + 2 * net.text_len * (net.text_dim * d + d * d)
    return Forward(
        linear=n * (12 * tokens * d * d + 4 * tokens * d * f) + 2 * tokens * d * ends + context,
        attention=4 * n * tokens**2 * d,
        cross_attention=4 * n * tokens * seen * d,
        moved_bytes=n * tokens * d * ((COMPILED_PASSES if compiled else EAGER_PASSES) + 4 * f / d),
    )


def forward_seconds(
    net: Transformer, tokens: int, card: Card, *, batch: int = 1, compiled: bool = False, launched: bool = True
) -> float:
    """Seconds of one forward of `batch` samples whose weights are on the card.

    Few tokens take less time than the host needs to launch their kernels, unless those are replayed as a CUDA graph,
    which is not `launched`.
    """
    cost = forward(net, tokens, compiled=compiled)
    rate = card.bf16 if net.element_size == 2 else card.tf32
    busy = (
        cost.linear / (GEMM * (card.fp8 if net.scaled and card.fp8 else rate))
        + cost.attention / (ATTENTION * rate)
        + cost.cross_attention / (CROSS_ATTENTION * rate)
        + cost.moved_bytes / (HBM * card.hbm)
    )
    made = 0 if net.scaled else net.coded * (1 + 2 * net.element_size)  # codes read, numbers written and read
    weights = net.num_bytes / (HBM * card.hbm)
    launching = net.num_blocks * (COMPILED_LAUNCH_S if compiled else LAUNCH_S) if launched else 0.0
    return max(batch * busy + made / (HBM * card.hbm), weights, launching)


# The text encoder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Sizes of umT5's encoder; its embedding table is what its layers leave of `num_bytes`.

    `element_size` is that of its layers' weights as they are kept.
    """

    num_bytes: int
    num_layers: int
    layer_bytes: int
    element_size: int = 2


def text_flops(net: TextEncoder, tokens: int) -> float:
    """FLOP to encode a text, attention's left out: it is a thousandth."""
    return 2 * tokens * net.num_layers * net.layer_bytes / net.element_size


# The VAE -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VAE:
    """Sizes of a Wan VAE, under the names of `wan.modules.vae_config.VAEConfig`."""

    num_bytes: int
    element_size: int = 4
    z_dim: int
    encoder_dim: int
    decoder_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_down: tuple[bool, ...]
    patch_size: int
    grouped: bool

    @property
    def stride(self) -> tuple[int, int]:
        """Frames per latent frame, pixels of a side per latent pixel."""
        return 2 ** sum(self.temporal_down), self.patch_size * 2 ** len(self.temporal_down)

    @property
    def scale(self) -> int:
        """Pixels of a side the decoder grows a latent pixel to; patches are unfolded behind it."""
        return 2 ** len(self.temporal_down)


@dataclass(frozen=True)
class Conv:
    """Some convolutions of one shape: kernel taps, channels in and out, places computed, number of them.

    `remembered` frames of the input are kept for the next chunk; `places` are those of one frame times the frames.
    """

    taps: int
    width_in: int
    width_out: int
    frames: float
    area: int
    count: int = 1
    remembered: int = 2

    @property
    def flops(self) -> float:
        return 2.0 * self.count * self.taps * self.width_in * self.width_out * self.frames * self.area

    @property
    def inputs(self) -> float:
        """Values that enter."""
        return self.count * self.width_in * self.frames * self.area

    @property
    def kept(self) -> int:
        """Values of earlier frames kept in front of them."""
        return self.count * self.remembered * self.width_in * self.area


def decoder(net: VAE, frames: int, height: int, width: int) -> Iterator[Conv]:
    """The convolutions that decode latents of this size."""
    mult = net.dim_mult[::-1]
    widths = [net.decoder_dim * factor for factor in (mult[0], *mult)]
    area, blocks = height * width, net.num_res_blocks + 1
    yield from _bottleneck(net.z_dim, widths[0], frames, area)
    for level, (width_in, wide) in enumerate(zip(widths, widths[1:], strict=False)):
        # The flat form halves the channels while it grows, the grouped one keeps them.
        first = width_in if net.grouped or not level else width_in // 2
        yield from _residual_blocks(first, wide, frames, area, blocks)
        if level < len(net.temporal_down):
            if net.temporal_down[::-1][level]:
                yield Conv(3, wide, 2 * wide, frames - 1, area)
                frames = 2 * frames - 1
            area *= 4
            yield Conv(9, wide, wide if net.grouped else wide // 2, frames, area, remembered=0)
    yield Conv(27, widths[-1], 3 * net.patch_size**2, frames, area)


def encoder(net: VAE, frames: int, height: int, width: int) -> Iterator[Conv]:
    """The convolutions that encode a video of this many pixels."""
    widths = [net.encoder_dim * factor for factor in (1, *net.dim_mult)]
    area = height * width // net.patch_size**2
    yield Conv(27, 3 * net.patch_size**2, widths[0], frames, area)
    for level, (width_in, wide) in enumerate(zip(widths, widths[1:], strict=False)):
        yield from _residual_blocks(width_in, wide, frames, area, net.num_res_blocks)
        if level < len(net.temporal_down):
            area //= 4
            yield Conv(9, wide, wide, frames, area, remembered=0)
            if net.temporal_down[level]:
                yield Conv(3, wide, wide, (frames - 1) // 2, area, remembered=1)
                frames = (frames + 1) // 2
    yield from _bottleneck(widths[-1], widths[-1], frames, area)
    yield Conv(27, widths[-1], 2 * net.z_dim, frames, area)


def _bottleneck(width_in: int, wide: int, frames: int, area: int) -> Iterator[Conv]:
    """The first convolution, two residual blocks, and attention's projections, at the latent's size."""
    yield Conv(27, width_in, wide, frames, area)
    yield from _residual_blocks(wide, wide, frames, area, 2)
    yield Conv(1, wide, 4 * wide, frames, area, remembered=0)


def _residual_blocks(width_in: int, wide: int, frames: int, area: int, blocks: int) -> Iterator[Conv]:
    yield Conv(27, width_in, wide, frames, area)
    yield Conv(27, wide, wide, frames, area, count=2 * blocks - 1)
    if width_in != wide:
        yield Conv(1, width_in, wide, frames, area, remembered=0)


def vae_flops(net: VAE, convs: Iterator[Conv], frames: int, area: int) -> float:
    """FLOP of a pass, with the attention over each of `frames` latent frames of `area` places."""
    widest = max(net.decoder_dim, net.encoder_dim) * net.dim_mult[-1]
    return sum(conv.flops for conv in convs) + 4.0 * frames * area**2 * widest


def vae_seconds(net: VAE, convs: list[Conv], frames: int, area: int, card: Card) -> float:
    """Seconds of a pass in eager mode."""
    rate = CONV * card.bf16 if net.element_size == 2 else TF32 * card.tf32
    moved = VAE_PASSES * net.element_size * sum(conv.inputs for conv in convs)
    return vae_flops(net, iter(convs), frames, area) / rate + moved / (HBM * card.hbm)


def vae_bytes(net: VAE, convs: list[Conv], frames_per_chunk: int, live_tensors: float) -> int:
    """Bytes beside the weights at the height of a pass: what is remembered, and the widest layer's tensors."""
    widest = max(conv.width_in * conv.area for conv in convs if conv.remembered == 2)
    live = live_tensors * net.stride[0] * frames_per_chunk * widest
    return int(net.element_size * (live + sum(conv.kept for conv in convs)))
