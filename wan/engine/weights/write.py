"""Weights written as they stream by: each tensor goes to its place in the file, so memory holds one at a time.

Where everything lies is planned from dtypes and shapes alone, so that the stream may come in any order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.files import DTYPES, Entry, read_header

Table = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Key -> dtype and shape of a tensor to write."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(folder: Path, stem: str, table: Table, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """`stem`.safetensors in `folder`, or shards of at most `limit` bytes (a larger tensor has its own) and an index."""
    shards = _split(table, limit)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    places: dict[str, Entry] = {}
    for name, keys in zip(names, shards, strict=True):
        places |= _begin(folder / name, {key: table[key] for key in keys})
    _fill(places, tensors)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_size(row) for row in table.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def write_pth(path: Path, table: Table, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A state dict that `torch.load` reads."""
    empty = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in table.items()}  # never touched: no memory
    with torch.serialization.skip_data():
        torch.save(empty, path)
    del empty
    _fill(read_header(path), tensors)


def table_bytes(table: Table) -> int:
    """The size of all tensors."""
    return sum(_size(row) for row in table.values())


def _size(row: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return row[0].itemsize * math.prod(row[1])


def _split(table: Table, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, row in table.items():
        if shards[-1] and filled + _size(row) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += _size(row)
    return shards


def _begin(path: Path, table: Table) -> dict[str, Entry]:
    """Write the header, make room for the tensors and say where each belongs; wide dtypes first, so all are aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for key, row in sorted(table.items(), key=lambda item: -item[1][0].itemsize):
        offsets[key] = at
        header[key] = {"dtype": _NAMES[row[0]], "shape": list(row[1]), "data_offsets": [at, at + _size(row)]}
        at += _size(row)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    base = 8 + len(text)
    return {key: Entry(path, base + offsets[key], dtype, shape) for key, (dtype, shape) in table.items()}


def _fill(places: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]]) -> None:
    missing = set(places)
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for key, tensor in tensors:
            place = places[key]
            if place.path not in files:
                files[place.path] = stack.enter_context(place.path.open("r+b"))
            files[place.path].seek(place.offset)
            files[place.path].write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            missing.remove(key)
    if missing:
        raise BadCheckpoint(f"no tensor came for {sorted(missing)[0]!r}: the file that held it has changed")
