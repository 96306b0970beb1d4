"""Weights as other programs keep them in 8 bits: the layers that were chosen become codes, scales and marks.

The other way round from `quantised`, which reads these and more dialects. Weights that are e4m3 with as many scales
already keep their codes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan.engine.ops.float8 import E4M3, Coded, quantize_weight
from wan.engine.weights.stream import WeightFile

__all__ = ["SPELLINGS", "QuantisingFile", "Spelling"]


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a program calls what belongs to a layer in 8 bits; `rows`: a scale for each output, else one number.

    `notes` stand beside every layer, `marks` once in the file.
    """

    scale: str
    rows: bool = False
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    marks: Mapping[str, Tensor] = field(default_factory=dict)


def _text(content: Mapping[str, str]) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


SPELLINGS = {
    # Two numbers in the mark: multiply in the precision of the inputs. None or another count would allow 8 bits there.
    "kijai": Spelling(scale="scale_weight", marks={"scaled_fp8": torch.zeros(2, dtype=E4M3)}),
    "comfyui": Spelling(scale="weight_scale", notes={"comfy_quant": _text({"format": "float8_e4m3fn"})}),
    "lightx2v": Spelling(scale="weight_scale", rows=True),
}
"""By program; each reads `weight` as e4m3 codes * scale, both of them under the layer's name."""


class QuantisingFile(WeightFile):
    """The tensors of a file with the weights of `layers`, matrices, in 8 bits. One of them is in memory at a time."""

    def __init__(self, plain: WeightFile, layers: Collection[str], spelling: Spelling) -> None:
        super().__init__(plain.path, {}, plain.dialect)
        self._plain, self._spelling = plain, spelling
        self._layers = {f"{layer}.weight": layer for layer in layers}
        shapes = plain.shapes()
        self._codes = {key: (E4M3, shapes[key]) for key in self._layers}
        self._beside: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (mark.dtype, tuple(mark.shape)) for name, mark in spelling.marks.items()
        }
        for key, layer in self._layers.items():
            self._beside[f"{layer}.{spelling.scale}"] = torch.float32, (shapes[key][0], 1) if spelling.rows else ()
            self._beside |= {
                f"{layer}.{name}": (note.dtype, tuple(note.shape)) for name, note in spelling.notes.items()
            }

    @property
    def quantised(self) -> frozenset[str]:
        """The keys of what is 8 bits or belongs to it; the others are the file's own."""
        return frozenset({*self._codes, *self._beside})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._plain.shapes() | {key: shape for key, (_, shape) in self._beside.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return self._plain.dtypes() | {key: dtype for key, (dtype, _) in (self._codes | self._beside).items()}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """What belongs to a layer comes with its weight; `keys` are those of the plain file."""
        yield from self._spelling.marks.items()
        for key, tensor in self._plain.stream(keys):
            layer = self._layers.get(key)
            if layer is None:
                yield key, tensor
                continue
            codes, scale = quantize_weight(tensor) if self._spelling.rows else _as_one(tensor)
            del tensor  # only its codes are kept while the next one is read
            yield key, codes
            yield f"{layer}.{self._spelling.scale}", scale
            yield from ((f"{layer}.{name}", note) for name, note in self._spelling.notes.items())


def _as_one(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a weight with one scale for all of it."""
    if isinstance(weight, Coded) and weight.codes.dtype == E4M3 and weight.scale.numel() == 1:
        return weight.codes, weight.scale.view(())
    codes, scale = quantize_weight((weight + 0 if isinstance(weight, Coded) else weight).reshape(1, -1))
    return codes.view(weight.shape), scale.view(())
