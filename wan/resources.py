"""Where the folders that travel with the package are: run presets, kernel sources and the demo model.

Imports nothing, so that the command line can look for a preset before torch is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def folder(name: Literal["configs", "kernels", "demo"]) -> Path:
    """The folder `name`: beside the package in a checkout, inside it in an installed wheel.

    Raises FileNotFoundError where neither exists (a package built without its data).
    """
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"the folder {name!r} is neither in {_PACKAGE / '_data'} nor beside {_PACKAGE}")
