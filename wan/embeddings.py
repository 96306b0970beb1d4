"""Text embeddings kept on disk: the negative prompt is encoded once ever, and a run whose texts are all known never
loads the text encoder (11 GB).

A result must not tell whether an embedding was computed or found. So everything that can change a bit of it is part of
its key: text, weights, tokenizer, dtype, device and versions. Prompts themselves are not stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 512 << 20
"""About 500 prompts of umT5-xxl at its full length, many more of the usual ones."""

FORMAT = 1
SUFFIX = ".embedding"
ABANDONED_SECONDS = 3600.0
"""A file that somebody began to write this long ago will not be finished."""

_DIGEST_BYTES = 32

_PACKAGES = ("ftfy", "tokenizers", "transformers", "sentencepiece")


class EmbeddingCache:
    """Embeddings in a folder, of the encoder called `encoder` (a hash of its weights and its tokenizer).

    `WanPipeline(..., embeddings=EmbeddingCache(folder, encoder))` uses it. What cannot be read or written costs the
    computing and nothing else; entries are checked against their own hash. The least recently used go when the folder
    holds more than `max_bytes`.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: str, *, max_bytes: int = MAX_BYTES) -> None:
        self.folder = Path(folder)
        self.encoder = encoder
        self.max_bytes = max_bytes

    def get(self, text: str, how: Mapping[str, Any]) -> Tensor | None:
        """The states [S, D] that `put` was given for this text, computed in this way; None if they are not known."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path_of(text, how)
        try:
            content = path.read_bytes()
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            states: Tensor = load(payload)["states"]
        except (OSError, SafetensorError, KeyError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used are removed first
        return states

    def put(self, text: str, how: Mapping[str, Any], states: Tensor) -> None:
        """Keep the states of a text that was just encoded."""
        from safetensors.torch import save

        payload = save({"states": states.detach().cpu().contiguous()})
        path = self.path_of(text, how)
        part = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part")  # two programs may encode the same text
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(payload).digest() + payload)
            os.replace(part, path)
            self._trim()
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def path_of(self, text: str, how: Mapping[str, Any]) -> Path:
        """The file of an entry, there or not."""
        known = {"format": FORMAT, "text": text, "encoder": self.encoder, "versions": versions(), "how": dict(how)}
        key = json.dumps(known, sort_keys=True, default=str).encode()
        return self.folder / f"{hashlib.sha256(key).hexdigest()}{SUFFIX}"

    def _trim(self) -> None:
        """Remove what nobody finished writing, and the least recently used until the rest fits."""
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another program trims too
                status = path.stat()
                if path.suffix == SUFFIX:
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == ".part" and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        excess = sum(size for _, size, _ in entries) - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size


@cache
def versions() -> dict[str, str]:
    """Package -> version, of those that clean, split and encode texts."""
    found = {"torch": str(torch.__version__)}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
