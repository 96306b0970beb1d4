"""`--embedding_cache`: where text embeddings are kept between runs, and by which hash their encoder is known."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli import env
from wan.engine.errors import BadRequest

if TYPE_CHECKING:
    from wan.embeddings import EmbeddingCache

OFF = "off"
FOLDER = "embeddings"


def cache_for(args: argparse.Namespace, record: Mapping[str, Any]) -> EmbeddingCache | None:
    """The cache a run with this record uses. None where it is off, or the weights are random or could not be hashed.

    Raises BadRequest where the user names a folder that cannot be used; the default one may fail unnoticed.
    """
    folder = _folder(args.embedding_cache, make=not args.print_plan)
    encoder = _encoder(record)
    if folder is None or encoder is None:
        return None
    from wan.embeddings import EmbeddingCache

    return EmbeddingCache(folder, encoder)


def _folder(named: str | None, *, make: bool) -> Path | None:
    if named is None:
        base = env.cache_folder()
        return None if base is None else base / FOLDER
    if named.lower() == OFF:
        return None
    folder = Path(named).expanduser()
    try:
        if make and named:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"--embedding_cache {named!r}: no folder can be made there ({error.strerror}); choose another, or off"
        ) from error
    if not named or (make and not os.access(folder, os.W_OK | os.X_OK)):
        raise BadRequest(f"--embedding_cache {named!r} is no folder that can be written: choose another, or off")
    return folder


def _encoder(record: Mapping[str, Any]) -> str | None:
    """Hash of the text encoder's weights and, where it has files of its own, of its tokenizer."""
    weights = record.get("weights", {})
    parts = [weights[part] for part in ("text_encoder", "tokenizer") if part in weights]
    if "text_encoder" not in weights or not all("hash" in part for part in parts):
        return None
    return " ".join(part["hash"] for part in parts)
