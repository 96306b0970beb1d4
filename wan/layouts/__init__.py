"""Where the parts of a checkpoint lie on disk: the original folders, diffusers', ComfyUI's, or files named one by one.

`locate` gives `Places`, whatever the layout; what the files hold is told by their keys (`wan.engine.weights.dialects`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan.layouts import comfyui, diffusers, original
from wan.layouts.places import CheckpointFiles, Places

__all__ = ["CheckpointFiles", "Places", "experts_of", "layout_of", "locate"]


def experts_of(config: Any) -> tuple[str, ...]:
    """The experts a task has, in the order they run."""
    return ("high", "low") if "low_noise_checkpoint" in config else ("dit",)


def layout_of(folder: Path) -> str:
    """ "diffusers", "ComfyUI" or "original", by the folders and files there."""
    if diffusers.recognises(folder):
        return "diffusers"
    return "ComfyUI" if comfyui.root_of(folder) is not None else "original"


def locate(folder: Path | None, config: Any, files: CheckpointFiles | None = None, kind: str = "t2v") -> Places:
    """Where each part is that a task needs; `files` take the place of what `folder` has, or of a folder.

    Raises BadCheckpoint where several files of a ComfyUI folder would do, or only quantised ones. What is not there at
    all is told by `Places.lacking`.
    """
    files = files or CheckpointFiles()
    names = experts_of(config)
    shared = original.shared(config)
    given = files.by_part(names, shared)
    if folder is None:
        return Places(layout="files", root=None, paths=dict.fromkeys((*names, *shared)) | given)
    if diffusers.recognises(folder):
        return Places(layout="diffusers", root=folder, paths=diffusers.paths(folder, names, shared) | given)
    root = comfyui.root_of(folder)
    if root is None:
        return Places(layout="original", root=folder, paths=original.paths(folder, names, config) | given)
    wanted = comfyui.Wanted(kind=kind, dim=config.dim, experts=names, shared=shared)
    return Places(layout="ComfyUI", root=root, paths=comfyui.paths(root, wanted, given))
