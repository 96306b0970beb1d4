"""Guidance branches that take turns at each block: the same bits as one after the other, whatever else is chosen.

That a swapped block is copied once for all of them is counted in `test_swapping.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.errors import IncompatibleOptions
from wan.engine.optimizations import Compile

DATA = Path(__file__).parents[1] / "data"
STEPS = 6
CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 5, "sampling_steps": STEPS, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "n_prompt": "grey, blurred", "offload_model": None,
}  # fmt: skip
CACHED: dict[str, Any] = {
    "cache": "mag", "cache_table": str(DATA / "cache-tiny.json"), "cache_threshold": 1e9, "cache_retain": 0.0,
}  # fmt: skip
IN_CALL: list[dict[str, Any]] = [
    {},
    {"share_first_block": True, "keep_text_keys": True},
    {"nag_scale": 11.0, "skip_layers": "1", "enhance_video": 4.0},
    CACHED | {"cfg_interval": "0-0.4"},
    {"cache": "easy", "cache_threshold": 1e9},
    {"context_frames": 13, "context_overlap": 4, "frame_num": 21},
]
BUILT: list[dict[str, Any]] = [
    {"compile": True},
    {"block_swap": 2, "ffn_rows": 3, "attention_rows": 3},
    {"residual_dtype": "bfloat16", "param_dtype": "bfloat16", "kernels": "cpu"},
    {"fp8": "scaled"},
    {"lora": str(DATA / "lora-tiny.safetensors"), "lora_mode": "onthefly"},
]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, tiny_task: Any) -> Any:
    return wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu")


def visits(pipe: Any, **options: Any) -> tuple[list[int], Tensor]:
    """The blocks in the order they are called, over both experts, and the video."""
    seen: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
        for expert in pipe.engine.expert_names
        for number, block in enumerate(pipe.engine.network(expert).blocks)
    ]
    try:
        return seen, pipe.generate("a red bird", **CALL | options)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("options", IN_CALL, ids=lambda options: "+".join(options))
def test_each_block_serves_both_branches_before_the_next_and_no_bit_changes(pipe: Any, options: dict[str, Any]) -> None:
    alone, expected = visits(pipe, **options)
    together, video = visits(pipe, **options, lockstep_cfg=True)
    assert torch.equal(video, expected)
    assert sorted(together) == sorted(alone), "not a forward more or less"
    assert alone[:2] == [0, 1] and together[:2] == [0, 0]


def test_what_is_kept_of_a_text_is_found_again(pipe: Any) -> None:
    calls: list[object] = []
    layers = [pipe.engine.network(expert).blocks[0].cross_attn.k for expert in pipe.engine.expert_names]
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call)) for layer in layers]
    pipe.generate("a red bird", **CALL, lockstep_cfg=True, keep_text_keys=True)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * 2, "once an expert and branch"


@pytest.mark.parametrize("options", BUILT, ids=lambda options: "+".join(options))
def test_it_goes_with_what_is_loaded(
    tiny_checkpoint: Path, tiny_task: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(Compile, "backend", "eager")
    pipe = wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu", **options)
    expected = pipe.generate("a red bird", **CALL)
    assert torch.equal(pipe.generate("a red bird", **CALL, lockstep_cfg=True), expected)


def test_branches_in_one_batch_have_no_turns_to_take(tiny_checkpoint: Path, tiny_task: Any) -> None:
    with pytest.raises(IncompatibleOptions, match=r"--lockstep_cfg .*--use_batched_cfg|--use_batched_cfg .*--lockstep"):
        wan.WanT2V(tiny_task, tiny_checkpoint, device="cpu", lockstep_cfg=True, use_batched_cfg=True)
