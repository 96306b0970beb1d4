"""Keys and values of texts are made once an expert, anew where weights change, and are the same bits."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.kept import Kept
from wan.modules.blocks import WanI2VCrossAttention

STEPS = 4
CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 1, "sampling_steps": STEPS, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "n_prompt": "grey, blurred", "offload_model": None,
}  # fmt: skip


@pytest.fixture
def pipe(tiny_checkpoint: Path, tiny_task: Any) -> Any:
    return wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu", lora_mode="onthefly")


def counted(pipe: Any, **options: Any) -> tuple[int, Tensor]:
    """How often the first block's text keys are made, over both experts, and the video."""
    calls: list[object] = []
    hooks = [
        pipe.engine.network(expert).blocks[0].cross_attn.k.register_forward_hook(lambda *call: calls.append(call))
        for expert in pipe.engine.expert_names
    ]
    try:
        video = pipe.generate("a red bird", **CALL | options)
    finally:
        for hook in hooks:
            hook.remove()
    return len(calls), video


def test_once_an_expert_and_branch_and_no_bit_changes(pipe: Any) -> None:
    plain, expected = counted(pipe)
    kept, video = counted(pipe, keep_text_keys=True)
    assert (plain, kept) == (2 * STEPS, 2 * 2)
    assert torch.equal(video, expected)
    assert counted(pipe)[0] == plain


def test_batched_branches_are_one_text(pipe: Any) -> None:
    plain, expected = counted(pipe, use_batched_cfg=True)
    kept, video = counted(pipe, use_batched_cfg=True, keep_text_keys=True)
    assert (plain, kept) == (STEPS, 2)
    assert torch.equal(video, expected)


def test_the_negative_prompt_of_nag_is_kept_without_being_asked(pipe: Any) -> None:
    plain, _ = counted(pipe, guide_scale=1.0)
    assert counted(pipe, guide_scale=1.0, nag_scale=11.0)[0] == plain + 2


def test_keys_are_made_anew_where_a_lora_changes_its_strength(pipe: Any) -> None:
    changing = f"{Path(__file__).parents[1] / 'data' / 'lora-tiny.safetensors'}:1@0-0.25"
    for options in ({}, {"nag_scale": 11.0}):
        _, expected = counted(pipe, lora=changing, **options)
        kept, video = counted(pipe, lora=changing, keep_text_keys=True, **options)
        assert torch.equal(video, expected)
    assert not torch.equal(counted(pipe, keep_text_keys=True)[1], expected)
    assert kept < 4 * STEPS


def test_image_tokens_have_keys_of_their_own_and_texts_take_theirs_along() -> None:
    layer = WanI2VCrossAttention(16, 2).requires_grad_(False)
    keep, text, image = Kept(lambda: ()), torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    first = keep(layer.keys_of, text)
    assert keep(layer.keys_of, text) is first
    torch.testing.assert_close(keep(layer.image_keys_of, image), layer.image_keys_of(image))
    assert len(keep._pairs) == 2
    del text
    gc.collect()
    assert len(keep._pairs) == 1
