"""Rows at a time give what all tokens at once give, for every kind of block, and so does the work in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.cli.generate import main
from wan.engine.accounting import Forwards
from wan.engine.errors import IncompatibleOptions
from wan.engine.ops import rows
from wan.engine.optimizations import AttentionRows, FFNRows
from wan.engine.types import Condition, Step
from wan.modules.image_embedding import ImageCondition
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceCondition, VaceWanModel

SIZES: dict[str, Any] = {
    "dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 3, "text_dim": 32, "freq_dim": 32, "text_len": 8,
}  # fmt: skip
TOKENS = 18
STEP = Step(0, 1, 500.0, 0.5, 0.0)


def model(kind: str) -> tuple[WanModel, Condition]:
    """A network of a kind of blocks and what it is asked for."""
    text = torch.randn(2, 5, 32)
    if kind == "vace":
        dit: WanModel = VaceWanModel(**SIZES, vace_layers=(0, 2), vace_in_dim=6)
        condition: Condition = VaceCondition(
            context=text, control=torch.randn(2, 6, 3, 4, 6), control_scale=torch.ones(2)
        )
    elif kind == "image":
        dit = WanModel("i2v", **SIZES, image_dim=12, image_positions=0)
        condition = ImageCondition(context=text, image=torch.randn(2, 5, 12))
    else:
        dit, condition = WanModel(**SIZES), Condition(context=text)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return dit.eval().requires_grad_(False), condition


def forward(dit: WanModel, condition: Condition, latents: Tensor, timestep: Tensor) -> Tensor:
    """Without gradients the engine's way, the trunk's tokens given away."""
    trunk = dit.trunk
    dit.trunk = Forwards({}).counting(trunk, give_away=True)
    try:
        with torch.inference_mode():
            return dit.velocity(latents, timestep, condition, STEP)
    finally:
        dit.trunk = trunk


def chunk(dit: WanModel, count: int) -> None:
    engine: Any = None  # of no interest to these
    FFNRows(ffn_rows=count).finish(dit, "dit", engine)
    AttentionRows(attention_rows=count).finish(dit, "dit", engine)


@pytest.mark.parametrize("kind", ["text", "image", "vace"])
@pytest.mark.parametrize("per_frame", [False, True])
def test_rows_of_any_number_in_place_and_in_runs_equal_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, kind: str, per_frame: bool
) -> None:
    dit, condition = model(kind)
    latents, timestep = torch.randn(2, 16, 3, 4, 6), torch.tensor([500.0, 20.0])
    if per_frame:
        timestep = timestep[:, None] * torch.tensor([0.0, 1.0, 1.0])
    with torch.enable_grad():  # there nothing is written in place, nor cut
        plain = dit.velocity(latents, timestep, condition, STEP)
    # Not bit by bit: without gradients a CPU computes the first linear layer and its GELU at once.
    torch.testing.assert_close(forward(dit, condition, latents, timestep), plain, rtol=0, atol=2e-5)
    monkeypatch.setattr(rows, "RUN_VALUES", 7 * 2 * 48)
    torch.testing.assert_close(forward(dit, condition, latents, timestep), plain, rtol=0, atol=2e-5)
    for part in dit.modules():
        assert vars(part).get("around_ffn", rows.at_once) is rows.at_once
    chunk(dit, 5)
    for _ in range(2):  # the second time nothing of the first is left
        torch.testing.assert_close(forward(dit, condition, latents, timestep), plain, rtol=0, atol=2e-5)
    with torch.enable_grad():
        traced = dit.velocity(latents, timestep, condition, STEP)
    torch.testing.assert_close(traced, plain, rtol=0, atol=2e-5)


def test_more_rows_than_tokens_are_all_of_them() -> None:
    dit, condition = model("text")
    latents, timestep = torch.randn(2, 16, 3, 4, 6), torch.tensor([500.0, 20.0])
    plain = forward(dit, condition, latents, timestep)
    chunk(dit, TOKENS + 1)
    torch.testing.assert_close(forward(dit, condition, latents, timestep), plain, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_blocks_in_rows_compile_whole_and_agree() -> None:
    dit, condition = model("text")
    latents, timestep = torch.randn(2, 16, 3, 4, 6), torch.tensor([500.0, 20.0])
    plain = forward(dit, condition, latents, timestep)
    chunk(dit, 7)
    torch._dynamo.utils.counters.clear()
    for block in dit.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(dit, condition, latents, timestep), plain, rtol=0, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_window_of_attention_is_refused() -> None:
    dit = WanModel(**SIZES, window_size=(3, 3))
    engine: Any = None
    with pytest.raises(IncompatibleOptions, match=r"--attention_rows 4 .*\(3, 3\)"):
        AttentionRows(attention_rows=4).finish(dit, "dit", engine)


@pytest.mark.parametrize("flag", ["--ffn_rows", "--attention_rows", "--vae_frames_per_call"])
def test_a_negative_number_ends_with_exit_code_2(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "t2v-demo", "--prompt", "a", flag, "-1"]) == 2
    assert f"{flag} -1" in capsys.readouterr().err
