"""Every task's numbers: `WAN_CONFIGS` (those that run), the named sizes, and the sizes each task was trained for."""

from __future__ import annotations

import os

from .shared_config import wan_shared_cfg
from .wan_animate_14B import animate_14B
from .wan_i2v_14B import flf2v_14B, i2v_14B
from .wan_i2v_A14B import i2v_A14B
from .wan_i2v_demo import i2v_demo
from .wan_s2v_14B import s2v_14B
from .wan_t2v_1_3B import t2v_1_3B
from .wan_t2v_14B import t2i_14B, t2v_14B
from .wan_t2v_A14B import t2v_A14B
from .wan_t2v_demo import t2v_demo
from .wan_ti2v_5B import ti2v_5B
from .wan_vace import vace_1_3B, vace_14B

__all__ = ["MAX_AREA_CONFIGS", "SIZE_CONFIGS", "SUPPORTED_SIZES", "WAN_CONFIGS", "wan_shared_cfg"]

# As upstream does: silences the tokenizer's warning after a fork. A user's own setting stands.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WAN_CONFIGS = {
    "t2v-A14B": t2v_A14B,
    "t2v-14B": t2v_14B,
    "t2v-1.3B": t2v_1_3B,
    "t2i-14B": t2i_14B,
    "i2v-A14B": i2v_A14B,
    "i2v-14B": i2v_14B,
    "flf2v-14B": flf2v_14B,
    "ti2v-5B": ti2v_5B,
    "vace-1.3B": vace_1_3B,
    "vace-14B": vace_14B,
    "s2v-14B": s2v_14B,
    "animate-14B": animate_14B,
    "t2v-demo": t2v_demo,
    "i2v-demo": i2v_demo,
}

# name -> (width, height): the numbers in the order of the name
SIZE_CONFIGS = {
    "720*1280": (720, 1280),
    "1280*720": (1280, 720),
    "480*832": (480, 832),
    "832*480": (832, 480),
    "1024*1024": (1024, 1024),
    "704*1280": (704, 1280),
    "1280*704": (1280, 704),
    "1024*704": (1024, 704),
    "704*1024": (704, 1024),
    "96*96": (96, 96),
}

# Pixels of a frame, for tasks whose aspect ratio follows their input.
MAX_AREA_CONFIGS = {name: width * height for name, (width, height) in SIZE_CONFIGS.items()}

_480P = ("480*832", "832*480")
_720P = ("720*1280", "1280*720")

# Every task of Wan 2.1 and 2.2, also those whose code is not here yet: --size is checked against its row.
SUPPORTED_SIZES = {
    "t2v-14B": (*_720P, *_480P),
    "t2v-1.3B": _480P,
    "t2i-14B": (*_720P, *_480P, "1024*1024"),
    "i2v-14B": (*_720P, *_480P),
    "flf2v-14B": (*_720P, *_480P),
    "vace-1.3B": _480P,
    "vace-14B": (*_720P, *_480P),
    "t2v-A14B": (*_720P, *_480P),
    "i2v-A14B": (*_720P, *_480P),
    "ti2v-5B": ("704*1280", "1280*704"),
    "s2v-14B": (*_720P, *_480P, "1024*704", "704*1024", "704*1280", "1280*704"),
    "animate-14B": _720P,
    "t2v-demo": ("96*96",),
    "i2v-demo": ("96*96",),
}
