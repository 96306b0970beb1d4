"""Guidance options on a tiny model: which forwards they save, and what a user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import wan
from wan.engine.errors import BadRequest

CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 1, "sampling_steps": 8, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "offload_model": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, tiny_task: Any) -> Any:
    return wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu")


def forwards(pipe: Any) -> dict[str, int]:
    count: dict[str, int] = {}
    for (_, branch), number in pipe.report.forwards[-1].done.items():
        count[branch] = count.get(branch, 0) + number
    return count


def test_outside_the_interval_the_prompts_forward_alone_is_run(pipe: Any) -> None:
    pipe.generate("a red bird", **CALL, cfg_interval="0.25-0.75")
    assert forwards(pipe) == {"cond": 8, "uncond": 4}


def test_the_whole_interval_gives_the_same_bits(pipe: Any) -> None:
    plain = pipe.generate("a red bird", **CALL)
    assert torch.equal(pipe.generate("a red bird", **CALL, cfg_interval="0-1"), plain)


def test_steps_that_stand_still_run_no_forward(pipe: Any) -> None:
    pipe.generate("a red bird", **CALL, cfg_zero_star=True, cfg_zero_init=2)
    assert forwards(pipe) == {"cond": 6, "uncond": 6}


@pytest.mark.parametrize(
    "option",
    [{"cfg_zero_star": True}, {"fresca": True, "fresca_cutoff": 1}, {"apg": True}, {"guidance_rescale": 0.7}],
    ids=str,
)
def test_a_correction_changes_guided_videos_and_leaves_unguided_ones_alone(pipe: Any, option: dict[str, Any]) -> None:
    assert not torch.equal(pipe.generate("a red bird", **CALL, **option), pipe.generate("a red bird", **CALL))
    unguided = CALL | {"guide_scale": 1.0}
    assert torch.equal(pipe.generate("a red bird", **unguided, **option), pipe.generate("a red bird", **unguided))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"cfg_interval": "0.8-0.2"}, "--cfg_interval '0.8-0.2' is not a share"),
        ({"cfg_interval": "half"}, "give FROM-TO within 0 and 1"),
        ({"cfg_zero_star": True, "cfg_zero_init": -1}, "--cfg_zero_init -1"),
        ({"fresca": True, "fresca_cutoff": 0}, "--fresca_cutoff 0"),
        ({"apg": True, "apg_limit": 0.0}, "--apg_limit 0.0"),
        ({"guidance_rescale": 1.5}, "--guidance_rescale 1.5 is a share"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    tiny_checkpoint: Path, tiny_config: Any, option: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRequest, match=said):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **option)
