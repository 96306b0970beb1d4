"""Which family makes a task, and the class that fronts it. The one place where a task's name decides anything."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from wan.engine.errors import BadRequest

if TYPE_CHECKING:
    from wan.engine.types import Family

# First part of the task's name -> (module with FAMILY, class in `wan`).
_FAMILIES = {
    "t2v": ("wan.families.t2v", "WanT2V"),
    "t2i": ("wan.families.t2v", "WanT2V"),
    "s2v": ("wan.families.s2v", "WanS2V"),
    "animate": ("wan.families.animate", "WanAnimate"),
    "i2v": ("wan.families.i2v", "WanI2V"),
    "flf2v": ("wan.families.i2v", "WanFLF2V"),
    "ti2v": ("wan.families.ti2v", "WanTI2V"),
    "vace": ("wan.families.vace", "WanVace"),
}


def family_of(task: str) -> Family:
    """The family that makes `task`; its module is imported at the first call. Raises BadRequest for an unknown one."""
    family: Family = importlib.import_module(_entry(task)[0]).FAMILY
    return family


def class_name(task: str) -> str:
    """Name in `wan` of the pipeline class for `task`."""
    return _entry(task)[1]


def _entry(task: str) -> tuple[str, str]:
    kind = task.partition("-")[0]
    if kind not in _FAMILIES:
        raise BadRequest(f"task {task!r} is unknown; this version makes {', '.join(_FAMILIES)} tasks")
    return _FAMILIES[kind]
