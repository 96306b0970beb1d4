"""Upstream's utility names, imported on first use so that none of them costs anything before."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "FlowDPMSolverMultistepScheduler": "wan.utils.fm_solvers",
    "get_sampling_sigmas": "wan.utils.fm_solvers",
    "retrieve_timesteps": "wan.utils.fm_solvers",
    "FlowUniPCMultistepScheduler": "wan.utils.fm_solvers_unipc",
    "HuggingfaceTokenizer": "wan.modules.tokenizers",
    "VaceVideoProcessor": "wan.conditioning.processor",
}

__all__ = [
    "FlowDPMSolverMultistepScheduler",
    "FlowUniPCMultistepScheduler",
    "HuggingfaceTokenizer",
    "VaceVideoProcessor",
    "get_sampling_sigmas",
    "retrieve_timesteps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
