"""The dialects of LoRA files: which tensor of ours each key changes, and what part of the change it holds.

Trainers write the layers of one model with dots or underscores, under prefixes of their own, in the original names or
in diffusers'. Here every layer goes by its name with underscores for dots, which all of them can be brought to and
which no two layers of a model share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from wan.engine.weights.keymap import DIFFUSERS_DIT, KeyMap

__all__ = ["FIRST", "SECOND", "Part", "Target", "flat", "our_name", "parts_of", "target_of"]

FIRST, SECOND = "transformer", "transformer_2"
"""diffusers' names of the high-noise and the low-noise expert."""

_PREFIX = re.compile(r"^(?:(?:base_model|model|diffusion_model|(?P<expert>transformer(?:_2)?)|unet|pipe|dit)\.)+")
_KOHYA = re.compile(r"^lora_unet_+")
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid"}
# PEFT's lora_A and lora_B, with or without the adapter's name; lora_down and lora_up; older libraries' spellings.
_PAIR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<side>A|B|down|up|mid)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
    r"|(?:\.|_)lora(?:_linear_layer)?\.(?P<old>down|up)\.weight)"
)
# Stand-In's, which act on the tokens of its picture alone.
_BEHIND = re.compile(r"(?P<attention>.+\.self_attn)\.(?P<to>[qkv])_loras\.(?P<side>down|up)\.weight")
_PAIR_BIAS = re.compile(r"(?P<layer>.+?)\.lora_(?:B|up)(?:\.(?!bias$)\w+)?\.bias")
_WHOLE = re.compile(r"(?P<layer>.+)\.diff(?P<kind>|_b|_m)")
# ComfyUI's markers, the shape a widened layer gets, and what trainers count: nothing of it changes a weight.
_WITHOUT_EFFECT = re.compile(r"(^|.*\.)(scaled_fp8|reshape_weight|num_batches_tracked|(global_)?step|epoch)")
_DIFFUSERS = re.compile(r"(^|_)attn[12]_|^condition_embedder_|^proj_out$|_ffn_net_")


class Target(NamedTuple):
    """A tensor of the model: its layer with underscores for dots, and "weight" or "bias"; a plain parameter is both."""

    layer: str
    kind: str


@dataclass(frozen=True)
class Part:
    """What one key of a file is: `role` "down", "up", "mid", "alpha", "diff" or "up_bias" of a change of `target`.

    `layer` is the layer as the file calls it, `expert` the one that the file gives it to, "" for any. What is `behind`
    acts only on tokens that a family puts behind those of the video.
    """

    target: Target
    role: str
    layer: str
    expert: str
    behind: bool = False


def flat(name: str) -> str:
    return name.replace(".", "_")


_FLAT_DIFFUSERS = KeyMap(tuple((flat(ours), flat(theirs)) for ours, theirs in DIFFUSERS_DIT.pairs))


def target_of(key: str) -> Target:
    """The target that the weight `key` of a model is."""
    layer, _, kind = key.rpartition(".")
    return Target(flat(layer), kind) if kind in ("weight", "bias") else Target(flat(key), "weight")


def our_name(key: str) -> str:
    """A whole weight's name, without the prefixes of other libraries."""
    bare = _PREFIX.sub("", key)
    return _translated(bare, DIFFUSERS_DIT) if _DIFFUSERS.search(flat(bare)) else bare


def parts_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Part], list[str], list[str]]:
    """(key -> what it is, keys without effect, keys that nothing is known of) of a file with these shapes."""
    found: dict[str, Part] = {}
    without_effect, unknown = [], []
    for key, shape in shapes.items():
        part = _part(key, shape)
        if part is not None:
            found[key] = part
        elif _WITHOUT_EFFECT.fullmatch(key) or math.prod(shape) == 0:
            without_effect.append(key)
        else:
            unknown.append(key)
    if _speaks_diffusers(found.values()):
        found = {key: _renamed(part) for key, part in found.items()}
    return found, without_effect, unknown


def _part(key: str, shape: tuple[int, ...]) -> Part | None:
    layer, _, last = key.rpartition(".")
    if last == "alpha" and math.prod(shape) == 1:
        return _named(layer, "weight", "alpha")
    if (match := _PAIR.fullmatch(key)) and len(shape) >= 2:
        return _named(match["layer"], "weight", _SIDES[match["side"] or match["old"]])
    if match := _BEHIND.fullmatch(key):
        part = _named(f"{match['attention']}.{match['to']}", "weight", match["side"])
        return replace(part, behind=True)
    if match := _PAIR_BIAS.fullmatch(key):
        return _named(match["layer"], "bias", "up_bias")
    if match := _WHOLE.fullmatch(key):
        if match["kind"] == "_m":
            return _named(f"{match['layer']}.modulation", "weight", "diff")
        return _named(match["layer"], "bias" if match["kind"] else "weight", "diff")
    return None


def _named(layer: str, kind: str, role: str) -> Part:
    match = _PREFIX.match(layer)
    expert = (match["expert"] or "") if match else ""
    bare = _KOHYA.sub("", _PREFIX.sub("", layer))
    return Part(Target(flat(bare), kind), role, layer, expert)


def _speaks_diffusers(parts: Iterable[Part]) -> bool:
    """Whether the layers go by diffusers' names. Asked of a whole file: both sides call some layers alike."""
    return any(_DIFFUSERS.search(part.target.layer) for part in parts)


def _renamed(part: Part) -> Part:
    return replace(part, target=Target(_translated(part.target.layer, _FLAT_DIFFUSERS), part.target.kind))


def _translated(name: str, names: KeyMap) -> str:
    """Our name of diffusers' `name`, or itself where the map has none: the model says whether it has such a layer."""
    return names.to_ours(name) if names.covers(name) else name
