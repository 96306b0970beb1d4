"""Door to the kernel sources in the top-level `kernels/` folder, which a wheel carries as data.

That folder has no `__init__.py`, because it would shadow the PyPI package of the same name that other libraries probe
for.
"""

from __future__ import annotations

from wan.resources import folder

__path__.append(str(folder("kernels")))
