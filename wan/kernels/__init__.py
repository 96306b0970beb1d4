"""The kernels in the top-level folder `kernels/`, importable as `wan.kernels.<name>`.

That folder has no `__init__.py`: with one, it would shadow the PyPI package `kernels`, which diffusers looks for.
"""

from __future__ import annotations

from wan.resources import folder

__path__.append(str(folder("kernels")))
