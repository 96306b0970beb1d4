"""diffusers' folders: one per component, `transformer` being the high-noise expert where there is a `transformer_2`."""

from __future__ import annotations

from pathlib import Path


def recognises(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file()


_FOLDERS = {"clip": "image_encoder"}
"""Part -> its folder, where that is called otherwise."""


def paths(folder: Path, experts: tuple[str, ...], shared: tuple[str, ...]) -> dict[str, Path | None]:
    """Part -> place."""
    names = ("transformer", "transformer_2")
    places: dict[str, Path | None] = {part: folder / name for part, name in zip(experts, names, strict=False)}
    return places | {part: folder / _FOLDERS.get(part, part) for part in shared}
