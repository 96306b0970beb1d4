"""Where each tensor of a checkpoint lies in its files, found from headers alone.

Safetensors and zipped `.pth` files both store every tensor as plain bytes at a known offset, so one table of
`Entry` serves them and the bytes are read with ordinary reads: memory-mapped pages would stay in the process's
resident memory beside the network made from them, which for a float32 checkpoint is twice the network.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
MAX_HEADER_BYTES = 100 * 2**20
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
SAFETENSORS = (".safetensors", ".sft")
_WEB_PAGE = "is a web page, not weights: the download got an error or a login page; download it again"
NOT_WEIGHTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"),
    (b"<!doctype", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"<?xml", _WEB_PAGE),
    (
        b"gguf",
        "is a GGUF file, whose quantised weights this version cannot use; pass the bf16 or fp16 .safetensors "
        "file of the same model",
    ),
)
"""What else lies where weights should be, told by its first bytes (in lower case)."""


@dataclass(frozen=True)
class Entry:
    """One tensor: `span` bytes at `offset` of `path`; `tensor` instead where a format must be read whole."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    tensor: Tensor | None = None

    @property
    def elements(self) -> int:
        """How many elements the span holds: a strided view may skip some."""
        if self.stride is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def span(self) -> int:
        return self.elements * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one .safetensors, .pth, .pt or .ckpt file. Raises BadCheckpoint naming the file."""
    check_content(path)
    entries = _safetensors_header(path) if path.suffix in SAFETENSORS else _pickle_header(path)
    size = path.stat().st_size
    for key, entry in entries.items():
        if entry.tensor is None and entry.offset + entry.span > size:
            raise truncated(entry, key)
    return entries


def check_content(path: Path) -> None:
    """Raise BadCheckpoint for a file that is empty, unreadable, or begins like something that is no checkpoint."""
    try:
        with path.open("rb") as file:
            start = file.read(32).lower()
    except OSError as error:
        raise BadCheckpoint(f"{str(path)!r} cannot be read ({error.strerror}); download it again") from error
    if not start:
        raise BadCheckpoint(f"{str(path)!r} is empty (0 bytes); download it again")
    for begins, what in NOT_WEIGHTS:
        if start.lstrip().startswith(begins):
            raise BadCheckpoint(f"{str(path)!r} {what}")


def read_index(index: Path) -> dict[str, Entry]:
    """The tensors an index file names, from whatever shards it names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{str(index)!r} is not an index of shards ({error}); download it again") from error
    for name, path in shards.items():
        if not path.is_file():
            raise BadCheckpoint(f"shard {name!r} is missing beside {str(index)!r}; download it again")
    headers = {name: read_header(path) for name, path in shards.items()}
    for key, name in weight_map.items():
        if key not in headers[name]:
            raise BadCheckpoint(f"shard {str(shards[name])!r} lacks {key!r}, which {index.name!r} promises")
    return {key: headers[name][key] for key, name in weight_map.items()}


def shards_of(path: Path) -> list[Path]:
    """All shards `path` is one of, when there is no index. Raises BadCheckpoint when one is missing."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    for each in paths:
        if not each.is_file():
            raise BadCheckpoint(f"shard {each.name!r} of {count} is missing in {str(path.parent)!r}; download it again")
    return paths


def truncated(entry: Entry, key: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{str(entry.path)!r} is truncated: {key!r} ends at byte {entry.offset + entry.span} and the file at byte "
        f"{entry.path.stat().st_size}; download it again"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself beside its tensors. Raises BadCheckpoint."""
    try:
        held = _safetensors_json(path)[0].get("__metadata__")
    except (OSError, ValueError, AttributeError) as error:
        raise BadCheckpoint(
            f"{str(path)!r} is truncated or no safetensors file ({error}); download it again"
        ) from error
    return held if isinstance(held, dict) else {}


def _safetensors_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header and its length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
            raise ValueError(f"its header would be {length} bytes long")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, length


def _safetensors_header(path: Path) -> dict[str, Entry]:
    try:
        header, length = _safetensors_json(path)
        header.pop("__metadata__", None)
        odd = [key for key, row in header.items() if row["dtype"] not in DTYPES]
        entries = {} if odd else {key: _safetensors_entry(path, 8 + length, row) for key, row in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(
            f"{str(path)!r} is truncated or no safetensors file ({error}); download it again"
        ) from error
    if odd:
        raise BadCheckpoint(
            f"{str(path)!r} stores {odd[0]!r} as {header[odd[0]]['dtype']}, which this version cannot read; pass the "
            "bf16 or fp16 file of the same model"
        )
    return entries


def _safetensors_entry(path: Path, base: int, row: Mapping[str, Any]) -> Entry:
    begin, end = row["data_offsets"]
    entry = Entry(path, base + begin, DTYPES[row["dtype"]], tuple(row["shape"]))
    if begin < 0 or min(entry.shape, default=0) < 0 or end - begin != entry.span:
        raise ValueError(f"{end - begin} bytes for {row['dtype']} {row['shape']}")
    return entry


def _pickle_header(path: Path) -> dict[str, Entry]:
    """Offsets from `torch.load`: weights_only, so that a hostile pickle is refused, never executed."""
    try:
        try:
            # On the meta device torch unpickles the table alone and notes where each storage lies in the file.
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6: no zip, read whole
    except pickle.UnpicklingError as error:
        raise BadCheckpoint(
            f"{str(path)!r} is damaged, or holds more than tensors and could run code when loaded; refused. "
            "Use a .safetensors file or the original download"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadCheckpoint(f"{str(path)!r} is truncated or no PyTorch file ({reason}); download it again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BadCheckpoint(f"{str(path)!r} is not a state dict (name -> tensor); pass a file of weights")
    return {key: _pickle_entry(path, value) for key, value in content.items()}


def _pickle_entry(path: Path, tensor: Tensor) -> Entry:
    if not tensor.is_meta:
        return Entry(path, 0, tensor.dtype, tuple(tensor.shape), tensor=tensor.detach())
    start: Any = tensor.untyped_storage()._checkpoint_offset
    assert start is not None, "torch.load onto meta notes storage offsets"
    stride = None if tensor.is_contiguous() else tensor.stride()
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    return Entry(path, offset, tensor.dtype, tuple(tensor.shape), stride)
