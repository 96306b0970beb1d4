"""What one way to run a video needs of a card, stage by stage, and how long it takes: computed before a weight is read.

A pure function of sizes, without a GPU; `wan.engine.budget` compares ways to run by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from wan.engine.activations import dit_activation_bytes
from wan.engine.coding import Size, Tile, decoding, encoding, latent
from wan.engine.roofline import (
    CPU_FLOPS,
    GB,
    GEMM,
    HBM,
    VAE,
    Card,
    TextEncoder,
    Transformer,
    forward_seconds,
    text_flops,
)

CONTEXT_BYTES = GB // 2
"""CUDA's own context in a process: outside what torch allocates, inside what a driver shows."""
WORKSPACE_BYTES = 7 * GB // 10
"""Workspaces of the libraries and what the allocator cannot use."""
LAYERS_AT_ONCE = 2
"""Layers of a streamed text encoder on the card: one computes while the next arrives."""
SWAP_SHARE = 0.01
"""What copying every block beside computing costs of its time; assumed."""

Made = TypeVar("Made")


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
    many, `guided` is how many do, and the others take one. A forward sees at most `window` frames (0: all), of which
    neighbours share `overlap`.
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
    window: int = 0
    overlap: int = 0

    @property
    def size(self) -> Size:
        return self.frames, self.height, self.width

    def latent(self, vae: VAE) -> tuple[int, int, int]:
        """Frames, rows and columns of its latents."""
        return latent(vae, self.size)

    def tokens(self, models: Models) -> int:
        """Tokens of a forward."""
        seen = replace(self, frames=min(self.frames, self.window or self.frames)).latent(models.vae)
        return math.prod(seen) // math.prod(models.transformer.patch) + self.more_tokens

    @property
    def windows(self) -> int:
        """Forwards that see the whole video once."""
        beyond = self.frames - self.window
        return 1 if not self.window or beyond <= 0 else 1 + math.ceil(beyond / max(1, self.window - 1 - self.overlap))


PLAIN: Mapping[str, Any] = {
    "offload_model": False, "vae_cpu": False, "t5_cpu": False, "stream_t5": False, "block_swap": 0,
    "prefetch_blocks": 1, "ffn_rows": 0, "attention_rows": 0, "use_batched_cfg": False, "lockstep_cfg": False,
    "vae_tiling": False, "vae_tile_size": 32, "vae_tile_overlap": 8, "vae_tile_park": True, "vae_dtype": "fp32",
    "compile": False, "cuda_graphs": False, "cache": "off", "fp8": "off", "share_first_block": False,
    "keep_text_keys": False, "residual_dtype": "float32", "vae_frames_per_call": 0,
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
    return Predictor(models, video, card).predict(values)


class Predictor:
    """`predict` for many ways to make one video on one card; what several have in common is computed once."""

    def __init__(self, models: Models, video: Video, card: Card) -> None:
        self.models, self.video, self.card = models, video, card
        self._known: dict[tuple[Any, ...], Any] = {}

    def predict(self, values: Mapping[str, Any]) -> Prediction:
        """What running with these option values needs; an option that is not given is plain."""
        given = {**PLAIN, **{name: value for name, value in values.items() if value is not None and name in PLAIN}}
        text, text_s = self._once(_text, given, _TEXT)
        step_s, denoise_s, rate = self._once(_denoise, given, _DENOISE)
        coded, coding_s = self._once(_coding, given, _CODING)
        stays, host_bytes, copied = self._once(_places, given, _PLACES)
        used = {"text": text, "denoise": self._once(_forward, given, _FORWARD), **coded}
        return Prediction(
            card=self.card,
            values=given,
            phases={phase: {**stays, **parts, **_OVERHEAD} for phase, parts in used.items()},
            seconds={"text": text_s, "denoise": denoise_s, **coding_s, "copies": copied / self.card.copy_rate},
            seconds_per_step=step_s,
            host_bytes=host_bytes,
            copy_rate_needed=rate,
        )

    def _once(self, part: Callable[[_Work], Made], given: Mapping[str, Any], names: tuple[str, ...]) -> Made:
        """`part`, which is given the options `names` and no others."""
        key = (part, *map(given.__getitem__, names))
        if key not in self._known:
            models = _with_vae(_with_fp8(self.models, given["fp8"]), given["vae_dtype"])
            self._known[key] = part(_Work(models, self.video, self.card, {name: given[name] for name in names}))
        found: Made = self._known[key]
        return found


class _Work(NamedTuple):
    """What a part of a prediction is made from."""

    models: Models
    video: Video
    card: Card
    given: Mapping[str, Any]
    """Of the options those that the part may look at; networks have the dtypes of all."""


SOLVED = 4
"""Latents, and what UniPC remembers of a step."""
_TEXT = ("t5_cpu", "stream_t5")
_SWAP = ("block_swap", "prefetch_blocks", "fp8")
_BRANCHES = ("use_batched_cfg", "lockstep_cfg")
_DENOISE = (*_SWAP, *_BRANCHES, "compile", "cuda_graphs", "offload_model")
_KEPT = ("cache", "share_first_block", "keep_text_keys", "residual_dtype")
_FORWARD = (*_DENOISE, *_KEPT, "ffn_rows", "attention_rows")
_CODING = ("vae_tiling", "vae_tile_size", "vae_tile_overlap", "vae_tile_park", "vae_dtype", "vae_frames_per_call")
_PLACES = (*_TEXT, *_SWAP, "offload_model", "vae_cpu", "vae_dtype")
_OVERHEAD = {"context and libraries": CONTEXT_BYTES + WORKSPACE_BYTES}


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


def _expert(work: _Work) -> tuple[int, int]:
    """(bytes of an expert on the card: what stays, and the places swapped blocks take turns in; of its LoRAs)."""
    net, swapped = work.models.transformer, _count(work.given["block_swap"], work.models)
    slots = min(swapped, 1 + work.given["prefetch_blocks"])
    size = net.num_bytes - int(swapped * net.swapped_bytes) + slots * net.block_bytes
    return size, work.models.lora.on_card(net.swappable - swapped, swapped)


def _places(work: _Work) -> tuple[dict[str, int], int, int]:
    """(networks on the card in every stage, needed there or not, bytes in RAM, bytes that cross the bus a video)."""
    models, given = work.models, work.given
    net, text_away = models.transformer, given["t5_cpu"] or given["stream_t5"]
    swapped = _count(given["block_swap"], models) * int(net.swapped_bytes)
    stays = {} if given["vae_cpu"] else {"VAE": models.vae.num_bytes}
    vae = models.vae.num_bytes if given["vae_cpu"] else 0
    host, copied = vae + models.experts * models.lora.host, 2 * vae
    if given["offload_model"]:
        host += models.experts * net.num_bytes + models.text.num_bytes + models.clip_bytes
        copied += models.experts * (net.num_bytes - swapped) + models.clip_bytes
        copied += 0 if text_away else models.text.num_bytes
    else:
        on_card, beside = _expert(work)
        stays |= {
            "transformer": on_card, "other experts": (models.experts - 1) * on_card, "LoRA": models.experts * beside,
            "image encoder": models.clip_bytes, "text encoder": _text_on_card(models.text, given),
        }  # fmt: skip
        host += models.experts * swapped + (models.text.num_bytes if text_away else 0)
    return {name: size for name, size in stays.items() if size}, host, copied


def _text_on_card(net: TextEncoder, given: Mapping[str, Any]) -> int:
    if given["t5_cpu"]:
        return 0
    return LAYERS_AT_ONCE * net.layer_bytes if given["stream_t5"] else net.num_bytes


def _forward(work: _Work) -> dict[str, int]:
    """Bytes of the transformer, and beside its weights while a forward runs and between forwards.

    Compiled blocks do not write the residual stream where it stands. A step cache keeps the tokens it was given, and
    of each forward of a step a residual; EasyCache's are latents, which are small. What the first block gives and the
    text's keys and values are in the blocks' dtype.
    """
    models, video, _, given = work
    net, tokens, batch = models.transformer, video.tokens(models), _batch(video, given)
    one = tokens * net.dim * net.element_size
    keeps, at_once = given["cache"] in ("tea", "mag"), _in_step(video, given)
    live = dit_activation_bytes(
        dim=net.dim, ffn_dim=net.ffn_dim, tokens=tokens, batch=batch, text_len=net.text_len + net.image_tokens,
        head_dim=net.dim // net.num_heads, ffn_rows=given["ffn_rows"], attention_rows=given["attention_rows"],
        param_bytes=net.element_size, stream_bytes=2 if given["residual_dtype"] == "bfloat16" else 4,
        streams=at_once * (1 + net.side_streams + keeps) + net.side_streams + bool(given["compile"]),
    )  # fmt: skip
    size, beside = _expert(work)
    resident = 1 if given["offload_model"] else models.experts
    parts = {"transformer": size, "LoRA": resident * beside + models.lora.for_call}
    # The first block of a side stack holds the tokens it was given, those it makes, and its input in the blocks' dtype;
    # in step also what it made for the other branches.
    parts |= {"activations": live + batch * (2 * at_once - 1) * net.side_streams * one}
    parts |= {"step cache": video.forwards * video.windows * one} if keeps else {}
    if video.windows > 1:  # latents count where a forward does not grow with them: what each branch makes of them too
        latents = 4 * models.vae.z_dim * math.prod(video.latent(models.vae))
        parts["latents"] = (SOLVED + video.forwards) * latents
    parts |= {"first block": one} if given["share_first_block"] else {}
    texts = 2 * net.num_blocks * (net.text_len + net.image_tokens) * net.dim * net.element_size
    return parts | ({"text keys": video.forwards * texts} if given["keep_text_keys"] else {})


def _batch(video: Video, given: Mapping[str, Any]) -> int:
    return 2 if given["use_batched_cfg"] and video.forwards > 1 else 1


def _in_step(video: Video, given: Mapping[str, Any]) -> int:
    """Forwards of a batch of one that go through the blocks side by side."""
    return video.forwards if given["lockstep_cfg"] and _batch(video, given) == 1 else 1


def _denoise(work: _Work) -> tuple[float, float, float]:
    """(seconds of a step, of all steps, bytes a second that swapped blocks need to arrive in time)."""
    models, video = work.models, work.video
    step_s, visit_s = _step_seconds(work)
    alone_s, _ = _step_seconds(work._replace(video=replace(video, forwards=1)))
    guided = video.steps if video.guided is None else video.guided
    copied = _count(work.given["block_swap"], models) * models.transformer.swapped_bytes
    return step_s, step_s * guided + alone_s * (video.steps - guided), copied / max(visit_s, 1e-9)


def _step_seconds(work: _Work) -> tuple[float, float]:
    """(seconds of a step, of what is computed while each block is there once); swapped blocks are spread evenly."""
    models, video, card, given = work
    net, tokens, batch, at_once = models.transformer, video.tokens(models), _batch(video, given), _in_step(video, given)
    launched = not (given["cuda_graphs"] and _in_place(work))
    computed = forward_seconds(net, tokens, card, batch=batch, compiled=bool(given["compile"]), launched=launched)
    computed = at_once * (computed + 2 * batch * tokens * models.lora.elements / (GEMM * card.bf16))
    swapped = _count(given["block_swap"], models)
    copied = swapped * net.swapped_bytes / card.copy_rate
    busy = computed * (1 + SWAP_SHARE * swapped / net.swappable)
    return max(busy, copied) * math.ceil(video.forwards / batch / at_once) * video.windows, computed


def _in_place(work: _Work) -> bool:
    """Whether blocks are compiled and weights stay where they are: a graph that is replayed holds addresses."""
    given = work.given
    moving = given["offload_model"] or given["lockstep_cfg"] or _count(given["block_swap"], work.models)
    return bool(given["compile"]) and not moving and not work.models.lora.host


def _text(work: _Work) -> tuple[dict[str, int], float]:
    """(bytes, seconds) of encoding the texts."""
    net, card, given = work.models.text, work.card, work.given
    flops = text_flops(net, 512)
    if given["t5_cpu"]:
        each = flops / CPU_FLOPS
    else:
        streamed = net.num_layers * net.layer_bytes / card.copy_rate if given["stream_t5"] else 0.0
        each = max(flops / (GEMM * card.bf16), net.num_bytes / (HBM * card.hbm), streamed)
    return {"text encoder": _text_on_card(net, given)}, work.video.texts * each


def _coding(work: _Work) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """(bytes, seconds) of decoding, and of encoding where something is given; by stage."""
    (models, video, card, given), net = work, work.models.vae
    cut = Tile(given["vae_tile_size"], given["vae_tile_overlap"], given["vae_tile_park"])
    tile = cut if given["vae_tiling"] else None
    size, seconds = decoding(net, video.size, card, tile, given["vae_frames_per_call"])
    used, took = {"decode": {"VAE": net.num_bytes, "frames": size}}, {"decode": seconds}
    if video.encodes:
        size, took["encode"] = encoding(net, video.size, card, tile)
        used["encode"] = {"VAE": net.num_bytes, "frames": size, "image encoder": models.clip_bytes}
    return used, took
