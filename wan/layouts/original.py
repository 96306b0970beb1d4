"""The folders Wan 2.1 and 2.2 were published in; file names come from the task's configuration.

Where the transformer is an adapter, what lacks is taken from the checkpoint it belongs to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wan.engine.weights.adapter import STEM as ADAPTER
from wan.engine.weights.adapter import base_of

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
    places = {"dit": folder}
    if "dit" not in experts:
        places = {"high": folder / config.high_noise_checkpoint, "low": folder / config.low_noise_checkpoint}
    homes = [folder, *_base(folder, *places.values())]
    names = {part: config[FILES[part]] for part in shared(config)}
    return places | {part: next((h / n for h in homes if (h / n).exists()), folder / n) for part, n in names.items()}


def _base(folder: Path, transformer: Path, *rest: Path) -> list[Path]:
    """The checkpoint that an adapter in `folder` changes: what they share need not be there twice."""
    base = base_of(transformer / f"{ADAPTER}.safetensors")
    return [] if base is None else [(base.parent / os.path.relpath(folder, transformer)).resolve()]
