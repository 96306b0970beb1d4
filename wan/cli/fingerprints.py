"""Which weights made a video, told by short hashes: cheap enough to be taken at every start, remembered between them.

Of a large file the hash covers its size, its header and blocks spread evenly over it. That tells models, versions and
merges apart; it does not prove that no byte in between was changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wan.cli import env
from wan.engine.weights.adapter import base_of
from wan.engine.weights.files import MAX_HEADER_BYTES, SAFETENSORS, read_index, shards_of
from wan.layouts.places import TOKENIZER_FILES
from wan.runs import write_whole

BLOCKS, BLOCK_BYTES = 64, 64 << 10
MAX_REMEMBERED = 4096
CACHE = "fingerprints.json"


def fingerprint(path: Path) -> str:
    """ "sha256:..." of a small file, "sampled-sha256:..." of a large one. Raises OSError."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= BLOCKS * BLOCK_BYTES:
            return f"sha256:{hashlib.sha256(file.read()).hexdigest()}"
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        if path.suffix in SAFETENSORS:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, MAX_HEADER_BYTES)))
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return f"sampled-sha256:{digest.hexdigest()}"


def fingerprint_of(path: Path, *, memory: Memory | None = None) -> str:
    """One hash of everything `path` stands for: a file, all shards of one, or the files of a tokenizer's folder.

    Where the files lie and what they are called does not matter. Raises OSError or BadCheckpoint.
    """
    take = fingerprint if memory is None else memory.fingerprint
    hashes = [take(each) for each in files_of(path)]
    if len(hashes) == 1:
        return hashes[0]
    return f"sampled-sha256:{hashlib.sha256(' '.join(hashes).encode()).hexdigest()}"


def files_of(path: Path) -> list[Path]:
    """The files with content behind a weight file, an index, a first shard or a tokenizer's folder, in order."""
    if path.is_dir():
        return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if path.name.endswith(".index.json"):
        return sorted({entry.path for entry in read_index(path).values()})
    base = base_of(path)
    return [*shards_of(path), *(files_of(base) if base is not None else [])]


class Memory:
    """The hashes taken before, in a file of the user's cache folder; a file is known by path, size and time.

    A cache that is broken, or a folder that cannot be written, costs a second look at the weights and nothing else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or env.cache_folder()
        self._path = None if folder is None else folder / CACHE
        self._known = {} if self._path is None else _load(self._path)
        self._learned = False

    def fingerprint(self, path: Path) -> str:
        """`fingerprint(path)`, without opening the file where it is known."""
        name, status = os.path.abspath(path), path.stat()
        state = [status.st_size, status.st_mtime_ns]
        held = self._known.get(name)
        if isinstance(held, list) and held[:2] == state and len(held) == 3 and isinstance(held[2], str):
            return held[2]
        taken = fingerprint(path)
        self._known.pop(name, None)  # the newest stand last, and the oldest are dropped first
        self._known[name] = [*state, taken]
        self._learned = True
        return taken

    def save(self) -> None:
        """Write what was learned."""
        if self._path is None or not self._learned:
            return
        kept = dict(list(self._known.items())[-MAX_REMEMBERED:])
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(kept, indent=0).encode())


def of_parts(paths: Iterable[tuple[str, Path]], memory: Memory | None = None) -> dict[str, dict[str, str]]:
    """Part -> {"file", "hash"}; a part without a readable file has no hash."""
    memory = memory or Memory()
    found: dict[str, dict[str, str]] = {}
    for part, path in paths:
        found[part] = {"file": os.path.abspath(path)}
        with contextlib.suppress(OSError, ValueError):
            found[part]["hash"] = fingerprint_of(path, memory=memory)
    memory.save()
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
