"""Whose network a weight file holds and whose names it uses, told by its keys, and files that are refused by name.

A layout of folders says where files lie; what is in them is decided here, so that any file may lie anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.adapter import base_of, open_adapted
from wan.engine.weights.animate_names import diffusers_animate
from wan.engine.weights.keymap import (
    CLIP_CUT,
    DIFFUSERS_DIT,
    TRANSFORMERS_CLIP,
    TRANSFORMERS_T5,
    Dialect,
    KeyMap,
    diffusers_vae,
    diffusers_vae22,
)
from wan.engine.weights.quantised import QuantisedFile, is_float8, refuse_packed
from wan.engine.weights.recut import RecutFile
from wan.engine.weights.stream import WeightFile, open_weights

DIT, TEXT_ENCODER, VAE, CLIP = "dit", "text_encoder", "vae", "clip"
CALLED = {DIT: "transformer", TEXT_ENCODER: "umT5 text encoder", VAE: "video VAE", CLIP: "CLIP image encoder"}
SPIECE = "spiece_model"
"""Under this name ComfyUI's text encoder files carry the tokenizer: the bytes of a sentencepiece model."""

_PREFIX = r"(?P<prefix>model\.diffusion_model\.|diffusion_model\.|model\.|)"


def _original(prefix: str, keys: list[str]) -> Dialect:
    return Dialect(prefix, left_out=(SPIECE,) if SPIECE in keys else ())


def _diffusers_dit(prefix: str, keys: list[str]) -> Dialect:
    if any(key.startswith(f"{prefix}motion_encoder.") for key in keys):
        return diffusers_animate(prefix, keys)
    return Dialect(prefix, DIFFUSERS_DIT)


def _transformers_t5(prefix: str, keys: list[str]) -> Dialect:
    """transformers lists the token embedding under two names, or under either."""
    second = "encoder.embed_tokens"
    if f"{prefix}shared.weight" in keys:
        return Dialect(prefix, TRANSFORMERS_T5, left_out=(SPIECE, f"{prefix}{second}.weight"))
    return Dialect(prefix, KeyMap((("token_embedding", second), *TRANSFORMERS_T5.pairs[1:])), left_out=(SPIECE,))


def _original_clip(prefix: str, keys: list[str]) -> Dialect:
    """The published file also has the text tower, which no video model uses."""
    return Dialect(prefix, left_out=[key for key in keys if not key.startswith(f"{prefix}visual.")])


def _transformers_clip(prefix: str, keys: list[str]) -> Dialect:
    spare = [key for key in keys if not key.startswith(f"{prefix}vision_model.") or key.endswith(".position_ids")]
    return Dialect(prefix, TRANSFORMERS_CLIP, left_out=spare, recut=CLIP_CUT)


def _diffusers_vae(prefix: str, keys: list[str]) -> Dialect:
    """The map depends on how many levels there are and how many blocks each has."""
    pattern = re.compile(re.escape(prefix) + r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.")
    found = [(int(match[1]), int(match[2])) for key in keys if (match := pattern.match(key))]
    levels, blocks = (1 + max(numbers) for numbers in zip(*found, strict=True)) if found else (1, 2)
    grouped = any(key.startswith(f"{prefix}encoder.down_blocks.0.resnets.") for key in keys)
    return Dialect(prefix, diffusers_vae22(blocks - 1) if grouped else diffusers_vae(levels, blocks - 1))


_NETWORKS: tuple[tuple[str, str, Callable[[str, list[str]], Dialect]], ...] = (
    (DIT, r"blocks\.\d+\.(self_attn|cross_attn)\.", _original),
    (DIT, r"blocks\.\d+\.attn[12]\.", _diffusers_dit),
    (TEXT_ENCODER, r"blocks\.\d+\.attn\.[qkvo]\.", _original),
    (TEXT_ENCODER, r"encoder\.block\.\d+\.layer\.", _transformers_t5),
    (VAE, r"(encoder\.down|decoder\.up)samples\.", _original),
    (VAE, r"(encoder\.down|decoder\.up)_blocks\.", _diffusers_vae),
    (CLIP, r"visual\.transformer\.\d+\.", _original_clip),
    (CLIP, r"vision_model\.encoder\.layers\.\d+\.", _transformers_clip),
)
"""Network, what its blocks are called (after a prefix), and the dialect that speaks so."""


def identify(keys: Iterable[str]) -> tuple[str, Dialect] | None:
    """(network, dialect) of a file with these keys; None where it is no network of Wan's."""
    listed = list(keys)
    for network, blocks, dialect in _NETWORKS:
        pattern = re.compile(_PREFIX + blocks)
        for key in listed:
            if match := pattern.match(key):
                return network, dialect(match["prefix"], listed)
    return None


def open_network(path: Path, network: str) -> WeightFile:
    """The weights of `network` under our names. Reads headers alone.

    Raises BadCheckpoint naming the file when it cannot be read, holds another network, or weights in 4 bits or int8.
    """
    base = base_of(path)
    if base is not None:
        return open_adapted(open_network(base, network), path)
    weights = open_weights(path)
    found = identify(weights.shapes())
    if found is None:
        first = next(iter(weights.shapes()), None)
        raise BadCheckpoint(f"{str(path)!r} is no {CALLED[network]}: its first weight is {first!r}")
    if found[0] != network:
        raise BadCheckpoint(f"{str(path)!r} is a {CALLED[found[0]]}, not a {CALLED[network]}")
    return under_our_names(weights, found[1])


def under_our_names(weights: WeightFile, dialect: Dialect) -> WeightFile:
    """A file in our names, shapes and cut, its 8-bit weights with their scales. Raises BadCheckpoint for 4 bits."""
    refuse_packed(weights, spare=(SPIECE,))
    renamed = weights.renamed(dialect)
    whole = QuantisedFile(renamed) if is_float8(renamed) else renamed
    return whole if dialect.recut is None else RecutFile(whole, dialect.recut)
