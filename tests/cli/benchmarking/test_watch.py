"""What a forward is said to compute is what arithmetic on its sizes says, and looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wan.cli.benchmarking.watch import PARTS, Watch
from wan.engine.types import Condition, Step
from wan.modules.model import WanModel


@pytest.fixture
def dit() -> WanModel:
    model = WanModel(dim=64, ffn_dim=160, freq_dim=32, text_dim=24, num_heads=2, num_layers=3, text_len=20)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def forward(dit: WanModel, branches: tuple[str, ...] = ("cond",)) -> torch.Tensor:
    torch.manual_seed(1)
    batch = len(branches)
    condition = Condition(context=torch.randn(batch, 20, 24))
    latents = torch.randn(1, 16, 3, 8, 12).expand(batch, -1, -1, -1, -1)
    with torch.inference_mode():
        return dit.velocity(latents, torch.full((batch,), 500.0), condition, Step(0, 2, 500.0, 0.5, 0.4), branches)


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")])
def test_flop_of_a_forward_is_the_formula_of_its_sizes(dit: WanModel, branches: tuple[str, ...]) -> None:
    """Blocks: q, k, v, o and cross q, o are 12 L d^2; cross k, v 4 S d^2; FFN 4 L d f; attention 4 L (L + S) d."""
    watch = Watch(torch.device("cpu"))
    with watch.over([dit]):
        forward(dit, branches)
        assert not watch.parts  # counting is slow, so the second forward is the one that is timed
        forward(dit, branches)
    tokens, texts, d, f, blocks = 3 * 4 * 6, 20, 64, 160, 3
    products = 12 * tokens * d * d + 4 * texts * d * d + 4 * tokens * d * f
    assert watch.flop == blocks * (products + 4 * tokens * (tokens + texts) * d)
    assert set(watch.texts) == set(branches) and watch.texts["cond"].shape == (20, 24)
    assert set(PARTS) < set(watch.parts) and all(seconds > 0 for seconds in watch.parts.values())


def test_looking_changes_neither_result_nor_model(dit: WanModel) -> None:
    """Rounding: a forward that is counted computes the activation by itself."""
    before, trunk = forward(dit), dit.trunk
    watch = Watch(torch.device("cpu"))
    with watch.over([dit]):
        torch.testing.assert_close(forward(dit), before, rtol=1e-5, atol=1e-5)
    assert dit.trunk == trunk and torch.equal(forward(dit), before)
    hooks: list[Any] = [module for module in dit.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


def test_compiled_blocks_are_not_looked_into(dit: WanModel) -> None:
    watch = Watch(torch.device("cpu"), inside=False)
    with watch.over([dit]):
        forward(dit)
        forward(dit)
    assert not watch.flop and not watch.parts and watch.texts["cond"].shape == (20, 24)


def test_first_step_gives_the_velocity_back() -> None:
    """Float32 latents of size 1 over a step of 0.01: 1e-5 of the velocity is rounding."""
    latents, velocity = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 2, 4, 4)
    step = Step(0, 10, 990.0, 0.99, 0.98)
    watch = Watch(torch.device("cpu"))
    watch.first_step(step, latents, latents + (step.sigma_next - step.sigma) * velocity)
    assert watch.velocity is not None
    torch.testing.assert_close(watch.velocity, velocity, rtol=0, atol=5e-5)
