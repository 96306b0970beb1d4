"""The demo model taught to continue a picture: adapters over its two experts (`demo/i2v/`), all else is the demo's."""

from __future__ import annotations

from .shared_config import make_config
from .wan_t2v_demo import t2v_demo

__all__ = ["i2v_demo"]

i2v_demo = make_config(
    "Wan I2V demo",
    t2v_demo,
    in_dim=36,
    model_type="i2v",
    image_dim=0,
    # Where its adapters were taught to take over from each other.
    boundary=0.875,
    # It knows one size, so a picture of any shape is cut to it.
    sample_fit="crop",
)
