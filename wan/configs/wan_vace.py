"""Wan 2.1 VACE 1.3B and 14B: the text-to-video models with a side stack.

Where the stack acts stands in a checkpoint's config.json; here it serves --load_format dummy.
"""

from __future__ import annotations

from .shared_config import make_config
from .wan_t2v_1_3B import t2v_1_3B
from .wan_t2v_14B import t2v_14B

__all__ = ["vace_1_3B", "vace_14B"]

_VACE = {"sample_shift": 16.0, "vace_in_dim": 96}

vace_1_3B = make_config("Wan VACE 1.3B", t2v_1_3B, vace_layers=tuple(range(0, 30, 2)), **_VACE)  # noqa: N816
vace_14B = make_config("Wan VACE 14B", t2v_14B, vace_layers=tuple(range(0, 40, 5)), **_VACE)  # noqa: N816
