"""Guidance at blocks and attention: the papers' formulas, and who is touched by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.errors import BadRequest
from wan.engine.ops.attention import sdpa
from wan.engine.optimizations.attention_guidance import frame_attention, normalized_guidance

CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 5, "sampling_steps": 4, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "n_prompt": "grey, blurred", "offload_model": None,
}  # fmt: skip
EACH: list[dict[str, Any]] = [{"nag_scale": 11.0}, {"skip_layers": "1"}, {"enhance_video": 4.0}]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, tiny_task: Any) -> Any:
    return wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu")


def test_normalized_guidance_extrapolates_limits_and_mixes() -> None:
    """Token by token in plain Python, as the paper writes it."""
    wanted, unwanted = torch.randn(2, 1, 3, 2, 4)
    found = normalized_guidance(wanted, unwanted, 5.0, 2.5, 0.25)
    for token in range(3):
        plus, minus = wanted[0, token].flatten().tolist(), unwanted[0, token].flatten().tolist()
        guided = [5 * p - 4 * m for p, m in zip(plus, minus, strict=True)]
        ratio = sum(map(abs, guided)) / sum(map(abs, plus))
        if ratio > 2.5:
            guided = [g * 2.5 / ratio for g in guided]
        expected = [0.25 * g + 0.75 * p for g, p in zip(guided, plus, strict=True)]
        assert found[0, token].flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_equal_prompts_leave_attention_as_it_is() -> None:
    wanted = torch.randn(1, 3, 2, 4)
    torch.testing.assert_close(normalized_guidance(wanted, wanted, 11.0, 2.5, 0.25), wanted)


def test_frames_attend_to_each_other_place_by_place() -> None:
    """From the whole attention matrix of every place: F x F, its diagonal left out."""
    grid, heads, width = (3, 2, 4), 2, 8
    q, k = torch.randn(2, 1, 24 + 5, heads, width)  # five tokens beyond the grid are no frames
    means = []
    for place in range(8):
        at = [frame * 8 + place for frame in range(3)]
        for head in range(heads):
            weights = (q[0, at, head] @ k[0, at, head].T / width**0.5).softmax(-1)
            means.append((weights.sum() - weights.trace()) / 6)
    assert frame_attention(q, k, grid).tolist() == pytest.approx([float(torch.stack(means).mean())], rel=1e-5)
    assert frame_attention(q[:, :8], k[:, :8], (1, 2, 4)).tolist() == [0.0]


@pytest.mark.parametrize("option", EACH, ids=str)
def test_it_changes_the_video_and_leaves_nothing_behind(pipe: Any, option: dict[str, Any]) -> None:
    plain = pipe.generate("a red bird", **CALL)
    assert not torch.equal(pipe.generate("a red bird", **CALL, **option), plain)
    assert torch.equal(pipe.generate("a red bird", **CALL), plain)


@pytest.mark.parametrize("option", EACH, ids=str)
def test_batched_branches_are_told_apart(pipe: Any, option: dict[str, Any]) -> None:
    single = pipe.generate("a red bird", **CALL, **option)
    assert (pipe.generate("a red bird", **CALL, **option, use_batched_cfg=True) - single).abs().max() < 1e-3


def test_nag_leads_away_from_the_negative_prompt_without_a_second_forward(pipe: Any) -> None:
    call = CALL | {"guide_scale": 1.0}
    first = pipe.generate("a red bird", **call, nag_scale=11.0)
    assert {branch for _, branch in pipe.report.forwards[-1].done} == {"cond"}
    other = pipe.generate("a red bird", **call | {"n_prompt": "a fish"}, nag_scale=11.0)
    same = pipe.generate("a red bird", **call | {"n_prompt": "a red bird"}, nag_scale=11.0)
    assert not torch.equal(first, other)
    assert (same - pipe.generate("a red bird", **call)).abs().max() < 1e-4


def test_skipped_layers_are_left_out_of_the_unconditional_forward_alone(pipe: Any) -> None:
    ran: list[tuple[int, tuple[str, ...]]] = []
    dit = pipe.engine.network("high")
    inner = dit.run_block

    def watching(block: Any, tokens: Tensor, inputs: Any) -> Tensor:
        ran.append((list(dit.blocks).index(block), inputs.branches))
        return inner(block, tokens, inputs)  # type: ignore[no-any-return]

    dit.run_block = watching
    try:
        pipe.generate("a red bird", **CALL, skip_layers="1", skip_layers_interval="0-1")
    finally:
        dit.run_block = inner
    assert (1, ("cond",)) in ran and (0, ("uncond",)) in ran and (1, ("uncond",)) not in ran


def test_the_plain_attention_is_back_after_a_failure(pipe: Any) -> None:
    def fail(step: Any, latents: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe.generate("a red bird", **CALL, nag_scale=11.0, observe=(fail,))
    assert all(block.cross_attn.attend is sdpa for block in pipe.engine.network("high").blocks)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"skip_layers": "x"}, "is no list of numbers"),
        ({"skip_layers": "7"}, "the blocks are 0 to 1, not 7"),
        ({"skip_layers": "1", "skip_layers_interval": "2-3"}, "--skip_layers_interval '2-3'"),
        ({"nag_scale": 11.0, "nag_alpha": 2.0}, "an alpha of 0 to 1"),
        ({"nag_scale": 11.0, "compile": True}, "--nag_scale and --compile"),
        ({"enhance_video": -1.0}, "--enhance_video -1.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    tiny_checkpoint: Path, tiny_config: Any, option: dict[str, Any], said: str
) -> None:
    with pytest.raises((BadRequest, ValueError), match=said):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **option)
