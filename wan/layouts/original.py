"""The folders Wan 2.1 and 2.2 were published in; file names come from the task's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = {
    "text_encoder": "t5_checkpoint",
    "tokenizer": "t5_tokenizer",
    "vae": "vae_checkpoint",
    "clip": "clip_checkpoint",
}
"""Part besides the transformers -> the field of a task's configuration that names its file; no field, no such part."""


def shared(config: Any) -> tuple[str, ...]:
    """The parts that a task has besides its transformers."""
    return tuple(part for part, field in FILES.items() if field in config)


def paths(folder: Path, experts: tuple[str, ...], config: Any) -> dict[str, Path | None]:
    """Part -> place; one expert lies in the folder itself, two in folders of their own."""
    places: dict[str, Path | None] = {"dit": folder}
    if "dit" not in experts:
        places = {"high": folder / config.high_noise_checkpoint, "low": folder / config.low_noise_checkpoint}
    return places | {part: folder / config[FILES[part]] for part in shared(config)}
