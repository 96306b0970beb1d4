"""`--embedding_cache`: where text embeddings are kept between runs, and by which hash their encoder is known."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wan.cli import caches

if TYPE_CHECKING:
    from wan.embeddings import EmbeddingCache

FOLDER = "embeddings"


def cache_for(args: argparse.Namespace, record: Mapping[str, Any]) -> EmbeddingCache | None:
    """The cache a run with this record uses. None where it is off, or the weights are random or could not be hashed.

    Raises BadRequest where the user names a folder that cannot be used; the default one may fail unnoticed.
    """
    folder = caches.folder(args, "embedding_cache", FOLDER, make=not args.print_plan)
    encoder = _encoder(record)
    if folder is None or encoder is None:
        return None
    from wan.embeddings import EmbeddingCache

    return EmbeddingCache(folder, encoder)


def _encoder(record: Mapping[str, Any]) -> str | None:
    """Hash of the text encoder's weights and, where it has files of its own, of its tokenizer."""
    weights = record.get("weights", {})
    parts = [weights[part] for part in ("text_encoder", "tokenizer") if part in weights]
    if "text_encoder" not in weights or not all("hash" in part for part in parts):
        return None
    return " ".join(part["hash"] for part in parts)
