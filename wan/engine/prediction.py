"""What one way to run a video needs of a card, stage by stage, and how long it takes: computed before a weight is read.

A pure function of sizes, without a GPU; `wan.engine.budget` compares ways to run by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from wan.engine.activations import dit_activation_bytes
from wan.engine.roofline import (
    CPU_FLOPS,
    GB,
    GEMM,
    HBM,
    LIVE_TENSORS,
    LIVE_TENSORS_ENCODED,
    LIVE_TENSORS_GROUPED,
    PAGEABLE,
    VAE,
    Card,
    Conv,
    TextEncoder,
    Transformer,
    decoder,
    encoder,
    forward_seconds,
    text_flops,
    vae_bytes,
    vae_seconds,
)

CONTEXT_BYTES = GB // 2
"""CUDA's own context in a process: outside what torch allocates, inside what a driver shows."""
WORKSPACE_BYTES = 7 * GB // 10
"""Workspaces of the libraries and what the allocator cannot use."""
LAYERS_AT_ONCE = 2
"""Layers of a streamed text encoder on the card: one computes while the next arrives."""
SWAP_SHARE = 0.01
"""What copying every block beside computing costs of its time; assumed."""
DECODE_PIXELS = 8192
"""Latent pixels decoded at a time, as `wan.engine.decoding` has it."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Bytes that LoRAs keep beside an expert's weights, where these are not changed while they are read.

    On the card: `outside` the blocks and `in_block`, of a block on average, as long as what they belong to is there;
    `for_call` while a block computes. In RAM: `host`. `elements` are the numbers of all thin matrices.
    """

    outside: int = 0
    in_block: int = 0
    for_call: int = 0
    host: int = 0
    elements: int = 0

    def on_card(self, resident: int, swapped: int) -> int:
        """With so many blocks that stay and that come for their call alone; what is for a call is not in it."""
        return self.outside + self.in_block * (resident + bool(swapped))


@dataclass(frozen=True, kw_only=True)
class Models:
    """The sizes of a checkpoint: `experts` transformers of one size, the encoders, the VAE, LoRAs beside each expert.

    `float8` is the transformer as `--fp8` keeps it, where that may be.
    """

    transformer: Transformer
    text: TextEncoder
    vae: VAE
    experts: int = 1
    clip_bytes: int = 0
    float8: Transformer | None = None
    lora: Beside = Beside()


@dataclass(frozen=True, kw_only=True)
class Video:
    """What is made, as far as it costs. `frames` are those computed together; `more_tokens` do not belong to them.

    `encodes`: the VAE encodes pictures or frames first. `forwards` are those of a step; where only some steps take so
    many, `guided` is how many do, and the others take one.
    """

    width: int
    height: int
    frames: int
    steps: int = 50
    forwards: int = 2
    guided: int | None = None
    texts: int = 2
    encodes: bool = False
    more_tokens: int = 0

    def latent(self, vae: VAE) -> tuple[int, int, int]:
        """Frames, rows and columns of its latents."""
        time, side = vae.stride
        return (self.frames - 1) // time + 1, self.height // side, self.width // side

    def tokens(self, models: Models) -> int:
        """Tokens of a forward."""
        return math.prod(self.latent(models.vae)) // math.prod(models.transformer.patch) + self.more_tokens


PLAIN: Mapping[str, Any] = {
    "offload_model": False, "vae_cpu": False, "t5_cpu": False, "stream_t5": False, "block_swap": 0,
    "prefetch_blocks": 1, "ffn_rows": 0, "attention_rows": 0, "use_batched_cfg": False, "lockstep_cfg": False,
    "vae_tiling": False, "vae_tile_size": 32, "vae_tile_overlap": 8, "vae_dtype": "fp32", "compile": False,
    "cache": "off", "fp8": "off", "share_first_block": False, "keep_text_keys": False, "residual_dtype": "float32",
    "vae_frames_per_call": 0,
}  # fmt: skip
"""The options a prediction looks at, with what plain means; others do not change it.

A step cache counts with its memory; the seconds are those of a video whose every step is computed.
"""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one way to run is computed to need. Nothing in it is measured."""

    card: Card
    values: Mapping[str, Any]
    """Option -> value, of all options it looks at."""
    phases: Mapping[str, Mapping[str, int]]
    """Stage ("text", "encode", "denoise", "decode") -> part -> bytes on the card."""
    seconds: Mapping[str, float]
    """Stage -> seconds of a whole video, copies of weights included."""
    seconds_per_step: float
    host_bytes: int
    """RAM that networks need while they are not on the card."""
    copy_rate_needed: float = 0.0
    """Bytes a second that swapped blocks need to arrive in time; 0 without any."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Option -> why it was chosen; empty in what was only predicted."""
    budget: int | None = None

    @property
    def peak_phase(self) -> str:
        """The stage that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """What the process needs of the card at most, as the driver shows it."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def copies_hide(self) -> bool | None:
        """Whether swapped blocks arrive while others compute; None where none is swapped."""
        return self.copy_rate_needed <= self.card.copy_rate if self.copy_rate_needed else None

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def predict(models: Models, video: Video, card: Card, values: Mapping[str, Any]) -> Prediction:
    """What running with these option values needs; an option that is not given is plain."""
    given = {name: plain if values.get(name) is None else values[name] for name, plain in PLAIN.items()}
    models = _with_vae(_with_fp8(models, given["fp8"]), given["vae_dtype"])
    swapped = _count(given["block_swap"], models)
    dit_bytes = _on_card(models.transformer, swapped, given["prefetch_blocks"])
    beside = models.lora.on_card(models.transformer.swappable - swapped, swapped)
    stays = _staying(models, given, dit_bytes, beside)
    denoise_s, visit_s = _denoise_seconds(models, video, card, given, swapped)
    alone_s = _denoise_seconds(models, replace(video, forwards=1), card, given, swapped)[0]
    guided = video.steps if video.guided is None else video.guided
    decode_bytes, decode_s = _decode(models.vae, video, card, _tile(given), given["vae_frames_per_call"])
    used = {
        "text": {"text encoder": _text_on_card(models.text, given)},
        "denoise": {
            "transformer": dit_bytes,
            "LoRA": stays.get("LoRA", beside) + models.lora.for_call,
            **_activations(models, video, given),
        },
        "decode": {"VAE": models.vae.num_bytes, "frames": decode_bytes},
    }
    seconds = {
        "text": _text_seconds(models.text, video, card, given),
        "denoise": denoise_s * guided + alone_s * (video.steps - guided), "decode": decode_s,
        "copies": _copied(models, given) / card.copy_rate,
    }  # fmt: skip
    if video.encodes:
        frames, encode_s = _encode(models.vae, video, card, _tile(given))
        used["encode"] = {"VAE": models.vae.num_bytes, "frames": frames, "image encoder": models.clip_bytes}
        seconds["encode"] = encode_s
    overhead = CONTEXT_BYTES + WORKSPACE_BYTES
    needed = models.transformer.swapped_bytes * swapped / max(visit_s, 1e-9)
    return Prediction(
        card=card,
        values=given,
        phases={phase: {**stays, **parts, "context and libraries": overhead} for phase, parts in used.items()},
        seconds=seconds,
        seconds_per_step=denoise_s,
        host_bytes=_host_bytes(models, given, swapped),
        copy_rate_needed=needed,
    )


@lru_cache
def _with_fp8(models: Models, mode: str) -> Models:
    if mode not in ("weight", "scaled"):
        return models
    assert models.float8 is not None, "sizes in 8 bits are told where they may be chosen"
    return replace(models, transformer=replace(models.float8, scaled=mode == "scaled"))


@lru_cache
def _with_vae(models: Models, dtype: str) -> Models:
    vae = models.vae
    if dtype == "fp32" or vae.element_size == 2:
        return models
    return replace(models, vae=replace(vae, num_bytes=vae.num_bytes // 2, element_size=2))


def _count(swap: Any, models: Models) -> int:
    """Blocks that are swapped; "auto" can swap all."""
    most = models.transformer.swappable
    return most if swap == "auto" else min(int(swap), most)


def _on_card(net: Transformer, swapped: int, prefetched: int) -> int:
    """Bytes of an expert on the card: what stays, and the places swapped blocks take turns in."""
    return net.num_bytes - int(swapped * net.swapped_bytes) + min(swapped, 1 + prefetched) * net.block_bytes


def _staying(models: Models, given: Mapping[str, Any], dit_bytes: int, beside: int) -> dict[str, int]:
    """Networks that are on the card in every stage, whether it needs them or not."""
    stays = {} if given["vae_cpu"] else {"VAE": models.vae.num_bytes}
    if not given["offload_model"]:
        stays["transformer"] = dit_bytes
        if models.experts > 1:
            stays["other experts"] = (models.experts - 1) * dit_bytes
        stays["LoRA"] = models.experts * beside
        stays["image encoder"] = models.clip_bytes
        stays["text encoder"] = _text_on_card(models.text, given)
    return {name: size for name, size in stays.items() if size}


def _text_on_card(net: TextEncoder, given: Mapping[str, Any]) -> int:
    if given["t5_cpu"]:
        return 0
    return LAYERS_AT_ONCE * net.layer_bytes if given["stream_t5"] else net.num_bytes


def _activations(models: Models, video: Video, given: Mapping[str, Any]) -> dict[str, int]:
    """Bytes beside the weights while a forward runs, and between forwards.

    Compiled blocks do not write the residual stream where it stands. A step cache keeps the tokens it was given, and
    of each forward of a step a residual; EasyCache's are latents, which are small. What the first block gives and the
    text's keys and values are in the blocks' dtype.
    """
    net, tokens, batch = models.transformer, video.tokens(models), _batch(video, given)
    one = tokens * net.dim * net.element_size
    keeps, at_once = given["cache"] in ("tea", "mag"), _in_step(video, given)
    live = dit_activation_bytes(
        dim=net.dim, ffn_dim=net.ffn_dim, tokens=tokens, batch=batch, text_len=net.text_len + net.image_tokens,
        head_dim=net.dim // net.num_heads, ffn_rows=given["ffn_rows"], attention_rows=given["attention_rows"],
        param_bytes=net.element_size, stream_bytes=2 if given["residual_dtype"] == "bfloat16" else 4,
        streams=at_once * (1 + net.side_streams + keeps) + net.side_streams + bool(given["compile"]),
    )  # fmt: skip
    # The first block of a side stack holds the tokens it was given, those it makes, and its input in the blocks' dtype;
    # in step also what it made for the other branches.
    parts = {"activations": live + batch * (2 * at_once - 1) * net.side_streams * one}
    parts |= {"step cache": video.forwards * one} if keeps else {}
    parts |= {"first block": one} if given["share_first_block"] else {}
    texts = 2 * net.num_blocks * (net.text_len + net.image_tokens) * net.dim * net.element_size
    return parts | ({"text keys": video.forwards * texts} if given["keep_text_keys"] else {})


def _batch(video: Video, given: Mapping[str, Any]) -> int:
    return 2 if given["use_batched_cfg"] and video.forwards > 1 else 1


def _in_step(video: Video, given: Mapping[str, Any]) -> int:
    """Forwards of a batch of one that go through the blocks side by side."""
    return video.forwards if given["lockstep_cfg"] and _batch(video, given) == 1 else 1


def _host_bytes(models: Models, given: Mapping[str, Any], swapped: int) -> int:
    net, away = models.transformer, bool(given["offload_model"])
    dits = models.experts * (net.num_bytes if away else swapped * int(net.swapped_bytes))
    dits += models.experts * models.lora.host
    text = models.text.num_bytes if away or given["t5_cpu"] or given["stream_t5"] else 0
    return dits + text + (models.clip_bytes if away else 0) + (models.vae.num_bytes if given["vae_cpu"] else 0)


def _copied(models: Models, given: Mapping[str, Any]) -> int:
    """Bytes that cross the bus once a video: networks that are brought when needed."""
    vae = 2 * models.vae.num_bytes if given["vae_cpu"] else 0
    if not given["offload_model"]:
        return vae
    text = 0 if given["t5_cpu"] or given["stream_t5"] else models.text.num_bytes
    swapped = _count(given["block_swap"], models) * int(models.transformer.swapped_bytes)
    dits = models.experts * (models.transformer.num_bytes - swapped)
    return vae + text + models.clip_bytes + dits


def _denoise_seconds(
    models: Models, video: Video, card: Card, given: Mapping[str, Any], swapped: int
) -> tuple[float, float]:
    """(seconds of a step, of what is computed while each block is there once); swapped blocks are spread evenly."""
    batch, at_once = _batch(video, given), _in_step(video, given)
    net, tokens = models.transformer, video.tokens(models)
    computed = _forward_seconds(net, tokens, card, batch, bool(given["compile"]))
    computed = at_once * (computed + 2 * batch * tokens * models.lora.elements / (GEMM * card.bf16))
    copied = swapped * net.swapped_bytes / card.copy_rate
    busy = computed * (1 + SWAP_SHARE * swapped / net.swappable)
    return max(busy, copied) * math.ceil(video.forwards / batch / at_once), computed


_forward_seconds = lru_cache(lambda net, tokens, card, batch, compiled: forward_seconds(
    net, tokens, card, batch=batch, compiled=compiled
))  # fmt: skip


def _text_seconds(net: TextEncoder, video: Video, card: Card, given: Mapping[str, Any]) -> float:
    flops = text_flops(net, 512)
    if given["t5_cpu"]:
        return video.texts * flops / CPU_FLOPS
    each = max(flops / (GEMM * card.bf16), net.num_bytes / (HBM * card.hbm))
    streamed = net.num_layers * net.layer_bytes / card.copy_rate if given["stream_t5"] else 0.0
    return video.texts * max(each, streamed)


def _tile(given: Mapping[str, Any]) -> tuple[int, int] | None:
    return (given["vae_tile_size"], given["vae_tile_overlap"]) if given["vae_tiling"] else None


@lru_cache(maxsize=256)
def _decode(net: VAE, video: Video, card: Card, tile: tuple[int, int] | None, at_a_time: int) -> tuple[int, float]:
    """(bytes, seconds) of decoding, `at_a_time` latent frames if that is not 0."""
    frames, rows, columns = video.latent(net)
    chunk = min(frames, at_a_time or max(1, DECODE_PIXELS // (rows * columns)))
    grid = _Grid.over(rows, columns, tile)
    part = list(decoder(net, frames, grid.height, grid.width))
    size = vae_bytes(net, part, chunk, LIVE_TENSORS)
    return _tiled(net, video, card, (grid, part, chunk), size)


@lru_cache(maxsize=256)
def _encode(net: VAE, video: Video, card: Card, tile: tuple[int, int] | None) -> tuple[int, float]:
    """(bytes, seconds) of encoding a whole video."""
    frames, rows, columns = video.latent(net)
    grid, side = _Grid.over(rows, columns, tile), net.stride[1]
    part = list(encoder(net, video.frames, grid.height * side, grid.width * side))
    size = vae_bytes(net, part, 1, LIVE_TENSORS_GROUPED if net.grouped else LIVE_TENSORS_ENCODED)
    return _tiled(net, video, card, (grid, part, 1), size)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The tiles of a frame: how many, and their size in latent pixels."""

    tiles: int
    height: int
    width: int

    @classmethod
    def over(cls, rows: int, columns: int, tile: tuple[int, int] | None) -> _Grid:
        if tile is None:
            return cls(tiles=1, height=rows, width=columns)
        (down, height), (across, width) = (_cut(side, *tile) for side in (rows, columns))
        return cls(tiles=down * across, height=height, width=width)


def _tiled(net: VAE, video: Video, card: Card, work: tuple[_Grid, list[Conv], int], size: int) -> tuple[int, float]:
    """(bytes, seconds) of a pass over all tiles, where one takes `size` and goes through these convolutions.

    What a tile remembers waits in RAM while others compute. The bottleneck sees whole frames, and the joined ones are
    float32.
    """
    grid, part, chunk = work
    frames, rows, columns = video.latent(net)
    seconds = grid.tiles * vae_seconds(net, part, frames, grid.height * grid.width, card)
    if grid.tiles == 1:
        return size, seconds
    parked = sum(conv.kept for conv in part) * net.element_size
    bottleneck = 8 * net.element_size * net.decoder_dim * net.dim_mult[-1] * rows * columns
    joined = 4 * 3 * video.width * video.height * chunk * net.stride[0]
    copies = 2 * grid.tiles * parked * math.ceil(frames / chunk) / PAGEABLE
    return size + bottleneck + joined, seconds + copies


def _cut(length: int, tile: int, overlap: int) -> tuple[int, int]:
    """(number, length) of the tiles that cover `length`."""
    if length <= tile:
        return 1, length
    count = -(-(length - overlap) // (tile - overlap))
    return count, -(-(length + (count - 1) * overlap) // count)
