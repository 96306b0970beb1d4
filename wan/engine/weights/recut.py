"""Weights that other files cut otherwise: several layers where we have one, without dims of 1 or some constants.

`RecutFile` reads such a file in our cut, `CutFile` gives our weights in the other one, from the same `Recut`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.keymap import KeyMap, Recut
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


class CutFile(WeightFile):
    """The tensors of `whole`, which has our names, under their `names` and in their cut; `without` are left out.

    Raises BadCheckpoint for a weight that the other side has no name for, or takes for a constant that it is not.
    """

    def __init__(self, whole: WeightFile, names: KeyMap, recut: Recut | None, without: Collection[str] = ()) -> None:
        super().__init__(whole.path, {})
        self._whole = whole
        self._recut = recut or Recut("", (), {})
        self._check_constants()
        kept = [key for key in whole.shapes() if key not in without and key not in self._recut.constants]
        self._pieces = {key: tuple(names.to_theirs(piece) for piece in self._names(key)) for key in kept}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        known = self._whole.shapes()
        shapes: dict[str, tuple[int, ...]] = {}
        for key, pieces in self._pieces.items():
            shape = self._bare(key, known[key])
            shapes |= dict.fromkeys(pieces, (shape[0] // len(pieces), *shape[1:]) if len(pieces) > 1 else shape)
        return shapes

    def dtypes(self) -> dict[str, torch.dtype]:
        known = self._whole.dtypes()
        return {piece: known[key] for key, pieces in self._pieces.items() for piece in pieces}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Always everything that `keys` touches: a layer of ours is read once for all its pieces."""
        wanted = None if keys is None else set(keys)
        touched = [key for key, pieces in self._pieces.items() if wanted is None or not wanted.isdisjoint(pieces)]
        for key, tensor in self._whole.stream(touched):
            pieces = self._pieces[key]
            yield from zip(pieces, tensor.reshape(self._bare(key, tuple(tensor.shape))).chunk(len(pieces)), strict=True)

    def _names(self, key: str) -> tuple[str, ...]:
        """What a weight is called once its layer is cut, in our way of naming."""
        layer, _, kind = key.rpartition(".")
        if not self._recut.name or not layer.endswith(f".{self._recut.name}"):
            return (key,)
        return tuple(f"{layer.removesuffix(self._recut.name)}{piece}.{kind}" for piece in self._recut.of)

    def _bare(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[self._recut.leading.get(key, 0) : len(shape) - self._recut.trailing.get(key, 0)]

    def _check_constants(self) -> None:
        constants = self._recut.constants
        for key, value in self._whole.stream(key for key in constants if key in self._whole.shapes()):
            if not torch.equal(value.float(), constants[key]):
                raise BadCheckpoint(
                    f"{str(self.path)!r} has a {key!r} of its own, and diffusers' class always uses the published one: "
                    "the model would be another there; keep the original layout"
                )
