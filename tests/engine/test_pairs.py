"""Any two optimisations work together or say why not, naming both."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import wan
from wan.engine.errors import IncompatibleOptions
from wan.engine.optimizations import Compile, registry
from wan.engine.options import options_of
from wan.engine.plan import Optimization, Plan, switch_flag

DATA = Path(__file__).parents[1] / "data"
EXAMPLES: dict[str, dict[str, Any]] = {
    "lora": {"lora": str(DATA / "lora-tiny.safetensors")},
    "cache": {"cache": "mag", "cache_table": str(DATA / "cache-tiny.json")},
    "cfg_interval": {"cfg_interval": "0-0.5"},
    "skip_layers": {"skip_layers": "1"},
    "context_frames": {"context_frames": 81},
}
"""What to ask for where the switch's value is not just on."""
PAIRS = list(combinations(registry(), 2))
SIZE: dict[str, Any] = {"size": (32, 32), "frame_num": 1, "sampling_steps": 2, "seed": 1, "offload_model": None}


def switched_on(cls: type[Optimization]) -> dict[str, Any]:
    """The first value of the class's switch that is not its default."""
    switch = options_of(cls)[0]
    if switch.name in EXAMPLES:
        return EXAMPLES[switch.name]
    candidates = switch.choices or ((True, False) if switch.is_switch else (1,))
    return {switch.name: next(value for value in candidates if value != switch.default)}


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compile, "backend", "eager")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(cls.__name__ for cls in pair))
def test_every_pair_composes_in_either_order_or_is_refused_by_name(
    tiny_checkpoint: Path, tiny_config: Any, pair: tuple[type[Optimization], type[Optimization]]
) -> None:
    """Two of one order commute: they give the same video bit by bit whichever is registered first."""
    chosen = switched_on(pair[0]) | switched_on(pair[1])
    videos = []
    for classes in (pair, pair[::-1]) if pair[0].order == pair[1].order else (pair,):
        plan = Plan.of(classes, chosen)
        try:
            pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", optimizations=plan)
        except IncompatibleOptions as refusal:
            assert all(switch_flag(cls) in str(refusal) for cls in pair), refusal
            return
        # Compiling one expert says what compiling two would.
        steps = {"sampling_steps": 1} if Compile in pair else {}
        videos.append(pipe.generate("a red bird", **SIZE | steps))
    assert all(video is not None and torch.isfinite(video).all() for video in videos)
    assert all(torch.equal(video, videos[0]) for video in videos)
