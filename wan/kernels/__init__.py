"""Door to the kernel sources in the top-level `kernels/` folder.

That folder has no `__init__.py`, because it would shadow the PyPI package of the same name that other libraries probe
for. In a wheel the sources are installed into this folder itself.
"""

from __future__ import annotations

from pathlib import Path

_SOURCES = Path(__file__).resolve().parents[2] / "kernels"
if _SOURCES.is_dir():
    __path__.append(str(_SOURCES))
