"""LoRA files: whatever their dialect, pairs of thin matrices by our names of the layers they change.

W' = W + strength * alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685). Read like weights: headers first, a
pair only when its layer comes along.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.keymap import DIFFUSERS_DIT
from wan.engine.weights.stream import WeightFile, open_weights

__all__ = ["LoRAFile", "merged", "open_lora", "read_lora"]

_PREFIX = re.compile(r"^((base_model|model|diffusion_model|transformer|unet|pipe|dit)\.)+")
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# PEFT's lora_A and lora_B, with or without the adapter's name; lora_down and lora_up; older libraries' spellings.
_PAIR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<side>A|B|down|up)(?:\.(?!weight$)\w+)?(?:\.weight)?"
    r"|(?:\.|_)lora(?:_linear_layer)?\.(?P<old>down|up)\.weight)"
)
_KOHYA = re.compile(r"lora_unet__?blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")
_DIFFUSERS = re.compile(r"blocks\.\d+\.(attn[12]|ffn\.net)\.|condition_embedder\.|proj_out$")


@dataclass(frozen=True)
class Pair:
    """Keys in the file of one layer's matrices, down [rank, in] and up [out, rank], and of its alpha."""

    down: str
    up: str
    alpha: str | None


class LoRAFile:
    """The pairs of a file by layer ("blocks.0.self_attn.q"). Only headers have been read."""

    def __init__(self, weights: WeightFile, pairs: Mapping[str, Pair]) -> None:
        self.path = weights.path
        self._weights = weights
        self._shapes = weights.shapes()
        self._pairs = dict(pairs)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._pairs)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise BadCheckpoint naming the first layer that a model of these shapes lacks or has in another size."""
        for layer, pair in self._pairs.items():
            target = shapes.get(f"{layer}.weight")
            if target is None:
                raise self.lacking(layer)
            down, up = self._shapes[pair.down], self._shapes[pair.up]
            if (up[0], down[0], math.prod(down[1:])) != (target[0], up[1], math.prod(target[1:])):
                raise BadCheckpoint(
                    f"LoRA {str(self.path)!r} has {list(up)} x {list(down)} for {layer!r}, whose weight is "
                    f"{list(target)}; it was made for a model of another size"
                )

    def lacking(self, layer: str) -> BadCheckpoint:
        """What to raise where the model has no such layer."""
        return BadCheckpoint(
            f"LoRA {str(self.path)!r} changes {layer!r}, which this transformer lacks; it was made for another model"
        )

    def added(self, key: str, tensor: Tensor, strength: float) -> Tensor:
        """The weight `key` with its pair added, in float32; `tensor` itself where there is none."""
        layer, _, kind = key.rpartition(".")
        if kind != "weight" or layer not in self._pairs:
            return tensor
        return torch.add(tensor.float(), self.delta(layer).view(tensor.shape), alpha=strength)

    def delta(self, layer: str) -> Tensor:
        """What is added to the layer's weight at strength 1, float32 [out, in]."""
        pair = self._pairs[layer]
        keys = [key for key in (pair.down, pair.up, pair.alpha) if key is not None]
        read = dict(self._weights.stream(keys))
        down, up = (read[key].float().flatten(1) for key in (pair.down, pair.up))
        scale = 1.0 if pair.alpha is None else float(read[pair.alpha]) / len(down)
        return torch.mm(up, down) * scale


def open_lora(path: Path) -> LoRAFile:
    """The LoRA in a file (.safetensors, .pt, .ckpt). Raises BadCheckpoint naming the first key it cannot use."""
    if not path.is_file():
        raise BadCheckpoint(f"LoRA {str(path)!r} does not exist; pass a .safetensors, .pt or .ckpt file")
    lora, rest = read_lora(open_weights(path))
    for key in rest.values():
        raise BadCheckpoint(
            f"LoRA {str(path)!r} holds {key!r}, which this version cannot merge: it reads pairs such as "
            "lora_A and lora_B or lora_down and lora_up, and their alpha"
        )
    return lora


def read_lora(weights: WeightFile) -> tuple[LoRAFile, dict[str, str]]:
    """The pairs of a file and what else it holds, key in the file by our name. Raises BadCheckpoint if a half lacks."""
    path, shapes = weights.path, weights.shapes()
    found: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    for key, shape in shapes.items():
        layer, _, last = key.rpartition(".")
        if last == "alpha" and math.prod(shape) == 1:
            found.setdefault(_ours(layer), {})["alpha"] = key
            continue
        match = _PAIR.fullmatch(key)
        if match is None or len(shape) < 2:
            rest[_ours(key)] = key
            continue
        found.setdefault(_ours(match["layer"]), {})[_SIDES[match["side"] or match["old"]]] = key
    for layer, keys in found.items():
        if missing := {"down", "up"} - keys.keys():
            raise BadCheckpoint(f"LoRA {str(path)!r} has no {missing.pop()!r} matrix for {layer!r}; download it again")
    if not found and not rest:
        raise BadCheckpoint(f"LoRA {str(path)!r} is empty; download it again")
    return LoRAFile(weights, {k: Pair(v["down"], v["up"], v.get("alpha")) for k, v in found.items()}), rest


def merged(
    weights: Iterable[tuple[str, Tensor]], loras: Sequence[tuple[LoRAFile, float]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream of weights with every (LoRA, strength) added, in float32 where one acts: rounded once, by who stores.

    One layer's pair is in memory at a time. Raises BadCheckpoint if a layer never comes.
    """
    waiting = [set(lora.layers) for lora, _ in loras]
    for key, tensor in weights:
        layer, _, kind = key.rpartition(".")
        for (lora, strength), layers in zip(loras, waiting, strict=True):
            if kind == "weight" and layer in layers:
                layers.remove(layer)
                tensor = lora.added(key, tensor, strength)
        yield key, tensor
        del tensor  # not kept alive while the next one is read
    for (lora, _), layers in zip(loras, waiting, strict=True):
        if layers:
            raise lora.lacking(min(layers))


def _ours(layer: str) -> str:
    """Our name of a layer."""
    if match := _KOHYA.fullmatch(layer):
        return f"blocks.{match[1]}.{match[2]}.{match[3]}"
    bare = _PREFIX.sub("", layer)
    return DIFFUSERS_DIT.to_ours(bare) if _DIFFUSERS.match(bare) else bare
