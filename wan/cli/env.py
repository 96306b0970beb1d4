"""Environment variables that must stand before torch is imported. The user's own settings always win."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prepare() -> None:
    """Set allocator and OpenMP defaults. Call it before anything imports torch; later it has no effect."""
    # Threads that spin between parallel regions take the other cores from data transfers and from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Networks of very different sizes enter and leave the card: without growing segments the freed blocks fragment and
    # a run that fits dies out of memory. Torch reads either name; Windows does not support it.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def rank() -> int:
    """This process's number as torchrun sets it; 0 in a single process. Only rank 0 talks to the user."""
    return int(os.environ.get("RANK", "0"))


def cache_folder() -> Path | None:
    """The user's folder for what can be made again, where the system wants it; None for a user without a home."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    place = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": str(home / "Library" / "Caches")}
    base = place.get(sys.platform, os.environ.get("XDG_CACHE_HOME"))
    return Path(base or home / ".cache") / "wan-engine"
