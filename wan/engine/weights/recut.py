"""Weights that other files cut otherwise: several layers where we have one, without dims of 1 or some constants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from wan.engine.weights.keymap import Recut
from wan.engine.weights.stream import WeightFile


class RecutFile(WeightFile):
    """The tensors of `parts` in our cut: what `recut` joins is joined along the first dim while it is read."""

    def __init__(self, parts: WeightFile, recut: Recut) -> None:
        super().__init__(parts.path, {}, parts.dialect)
        self._parts = parts
        self._recut = recut
        known = parts.shapes()
        joined: dict[str, tuple[str, ...]] = {}
        for key in known:
            layer, _, kind = key.rpartition(".")
            stem = layer.removesuffix(recut.of[0])
            pieces = tuple(f"{stem}{each}.{kind}" for each in recut.of)
            if stem.endswith(".") and layer != stem and all(piece in known for piece in pieces):
                joined[f"{stem}{recut.name}.{kind}"] = pieces
        taken = {piece for pieces in joined.values() for piece in pieces}
        self._pieces = {key: (key,) for key in known if key not in taken} | joined

    def shapes(self) -> dict[str, tuple[int, ...]]:
        known = self._parts.shapes()
        shapes = {}
        for key, pieces in self._pieces.items():
            first = known[pieces[0]]
            rows = first[:1] if len(pieces) == 1 else (sum(known[piece][0] for piece in pieces),)
            shapes[key] = self._view(key, rows + first[1:])
        return shapes | {key: tuple(value.shape) for key, value in self._recut.constants.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        known = self._parts.dtypes()
        stored = {key: known[pieces[0]] for key, pieces in self._pieces.items()}
        return stored | {key: value.dtype for key, value in self._recut.constants.items()}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        constants = self._recut.constants
        for key in [*self._pieces, *constants] if keys is None else keys:
            if key in constants:
                yield key, constants[key].clone()
                continue
            pieces = self._pieces.get(key, (key,))  # an unknown one is refused by the file itself
            found = dict(self._parts.stream(pieces))
            tensor = torch.cat([found[piece] for piece in pieces]) if len(pieces) > 1 else found[key]
            yield key, tensor.view(self._view(key, tuple(tensor.shape)))

    def _view(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * self._recut.leading.get(key, 0) + shape + (1,) * self._recut.trailing.get(key, 0)
