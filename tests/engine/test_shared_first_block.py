"""The first block's self-attention serves all branches of a step, and only where they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.errors import IncompatibleOptions
from wan.engine.optimizations.shared_first_block import SharedFirstBlock, differences
from wan.engine.sampling.denoiser import Sequential
from wan.engine.types import Condition, Layout, Segment, Step
from wan.modules.blocks import BlockInputs
from wan.modules.image_embedding import ImageCondition

STEPS = 3
CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 5, "sampling_steps": STEPS, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "n_prompt": "grey, blurred", "offload_model": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, tiny_task: Any) -> Any:
    return wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu")


def queries(pipe: Any, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Rows of each call of the first two blocks' query projections, over both experts, and the video."""
    rows: list[list[int]] = [[], []]
    hooks = [
        pipe.engine.network(expert)
        .blocks[number]
        .self_attn.q.register_forward_hook(lambda layer, given, out, calls=rows[number]: calls.append(len(out)))
        for expert in pipe.engine.expert_names
        for number in (0, 1)
    ]
    try:
        return rows, pipe.generate("a red bird", **CALL, **options)
    finally:
        for hook in hooks:
            hook.remove()


def test_one_self_attention_of_two_is_left_out_and_no_bit_changes(pipe: Any) -> None:
    (all_rows, others), plain = queries(pipe)
    assert all_rows == others == [1] * 2 * STEPS
    (first, second), shared = queries(pipe, share_first_block=True)
    assert (first, second) == ([1] * STEPS, [1] * 2 * STEPS)
    assert torch.equal(shared, plain)
    assert torch.equal(pipe.generate("a red bird", **CALL), plain)


def test_batched_branches_share_by_computing_half_the_rows(pipe: Any) -> None:
    plain = pipe.generate("a red bird", **CALL, use_batched_cfg=True)
    (first, second), shared = queries(pipe, share_first_block=True, use_batched_cfg=True)
    assert (first, second) == ([1] * STEPS, [2] * STEPS)
    assert (shared - plain).abs().max() < 1e-4


def test_rows_quantised_before_they_enter_are_shared_too(tiny_checkpoint: Path, tiny_task: Any) -> None:
    pipe = wan.WanT2V(type(tiny_task)(tiny_task), tiny_checkpoint, device="cpu", fp8="scaled", use_batched_cfg=True)
    plain = pipe.generate("a red bird", **CALL)
    assert (pipe.generate("a red bird", **CALL, share_first_block=True) - plain).abs().max() < 0.05


def test_a_single_branch_and_what_acts_on_the_first_block_stay_what_they_are(pipe: Any) -> None:
    for options in ({"cfg_interval": "0-0.4"}, {"skip_layers": "0"}, {"enhance_video": 4.0}, {"nag_scale": 11.0}):
        plain = pipe.generate("a red bird", **CALL, **options)
        assert torch.equal(pipe.generate("a red bird", **CALL, **options, share_first_block=True), plain), options


class Recorded:
    """An engine that notes what an optimisation hands it."""

    def __init__(self) -> None:
        self.wrap_segment, self.wrap_denoiser = Mock(), Mock()


def test_branches_that_differ_in_more_than_text_are_told_of_and_computed_one_by_one(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    text, engine, dit = torch.zeros(1, 2, 32), Recorded(), pipe.engine.network("high")
    branches = {name: Condition(context=text, frozen=torch.zeros(1, 1, 2, 4, 4)) for name in ("uncond", "cond")}
    SharedFirstBlock(share_first_block=True).apply(engine)  # type: ignore[arg-type]
    hooked, wrap = engine.wrap_segment.call_args.args[0], engine.wrap_denoiser.call_args.args[0]
    step, calls = Step(0, 1, 999.0, 1.0, 0.0, "high"), []
    latents = torch.randn(1, dit.in_dim, 2, 4, 4)
    handle = dit.blocks[0].self_attn.q.register_forward_hook(lambda *call: calls.append(call))
    with hooked(dit, Mock(branches=branches)), torch.inference_mode():
        wrap(Sequential(dit), dit, Segment("high", (step,)))(latents, step, branches)
    handle.remove()
    assert len(calls) == 2
    assert "the branches differ in ['frozen']" in caplog.text


def test_tensors_are_compared_as_objects() -> None:
    image, text = torch.zeros(1, 4, 8), torch.zeros(1, 2, 3)
    one = ImageCondition(context=text, image=image)
    assert differences({"a": one, "b": ImageCondition(context=text + 1, image=image)}) == []
    assert differences({"a": one, "b": ImageCondition(context=text, image=image.clone())}) == ["image"]
    assert differences({"a": one, "b": Condition(context=text)}) == ["image"]


@pytest.mark.parametrize("other", [{"compile": True}, {"attention_rows": 3}], ids=str)
def test_what_takes_the_first_block_as_one_piece_is_refused(
    tiny_checkpoint: Path, tiny_task: Any, other: dict[str, Any]
) -> None:
    with pytest.raises(IncompatibleOptions, match="--share_first_block"):
        wan.WanT2V(tiny_task, tiny_checkpoint, device="cpu", share_first_block=True, **other)


def test_extras_see_the_rows_they_are_computed_for() -> None:
    """The inputs of some samples: everything that has the batch in front is cut alike."""
    whole = BlockInputs(
        modulation=torch.zeros(2, 1, 6, 8), rope=torch.zeros(4, 1, 2, 2), frames=torch.zeros(4),
        layout=Layout((1, 2, 2)), branches=("uncond", "cond"),
        context=torch.zeros(2, 3, 8), features={"clip": torch.zeros(2, 5, 8)}, aligned={"face": torch.zeros(2, 4, 8)},
    )  # fmt: skip
    part = whole.of_samples(slice(1))
    cut = (part.modulation, part.context, part.features["clip"], part.aligned["face"])
    assert {len(each) for each in cut} == {1}
    assert part.branches == ("uncond",)
    assert part.rope is whole.rope
