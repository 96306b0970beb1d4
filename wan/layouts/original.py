"""The folders Wan 2.1 and 2.2 were published in; file names come from the task's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHARED = ("text_encoder", "tokenizer", "vae")
"""What every task has besides its transformers."""


def paths(folder: Path, experts: tuple[str, ...], config: Any) -> dict[str, Path | None]:
    """Part -> place; one expert lies in the folder itself, two in folders of their own."""
    places: dict[str, Path | None] = {"dit": folder}
    if "dit" not in experts:
        places = {"high": folder / config.high_noise_checkpoint, "low": folder / config.low_noise_checkpoint}
    shared = folder / config.t5_checkpoint, folder / config.t5_tokenizer, folder / config.vae_checkpoint
    return places | dict(zip(SHARED, shared, strict=True))
