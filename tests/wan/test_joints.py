"""The norm of a layer is made together with the sum before it where nothing stands between, and no bit tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.engine.ops import modulate
from wan.engine.ops.float8 import Float8Linear, quantize_weight
from wan.engine.ops.op import computed_by
from wan.engine.ops.rope import grid_table
from wan.engine.ops.rows import at_once
from wan.engine.types import Layout
from wan.modules.blocks import BlockInputs, WanAttentionBlock

FUSED = (modulate.gated_add_norm, modulate.gated_add_norm_quantize)


def block(scaled: bool, cross_attn_norm: bool = True) -> WanAttentionBlock:
    made = WanAttentionBlock("t2v_cross_attn", 48, 64, 2, cross_attn_norm=cross_attn_norm).requires_grad_(False)
    for name, layer in list(made.named_modules()) if scaled else ():
        if isinstance(layer, nn.Linear):
            in_codes = Float8Linear(layer, scaled=True)
            in_codes.weight.data, in_codes.weight_scale.data = quantize_weight(layer.weight.data)
            made.set_submodule(name, in_codes)
    return made


def inputs(by_row: bool) -> BlockInputs:
    return BlockInputs(
        modulation=torch.randn(1, 3 if by_row else 1, 6, 48),
        rows=torch.tensor([0, 0, 2, 1, 1, 2]) if by_row else None,
        rope=grid_table((1, 2, 3), 24),
        frames=torch.zeros(6, dtype=torch.long),
        context=torch.randn(1, 5, 48),
        layout=Layout((1, 2, 3), 6),
    )


class Counted:
    """The definition of an operation as a kernel, which counts its calls."""

    def __init__(self, operation: Any) -> None:
        self.operation, self.calls = operation, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.operation.definition(*args)


@torch.no_grad()
def counted(made: WanAttentionBlock, tokens: Tensor, given: BlockInputs) -> tuple[Tensor, list[int]]:
    kernels = {operation: Counted(operation) for operation in FUSED}
    with computed_by(kernels):
        out = made(tokens.clone(), given)
    return out, [kernel.calls for kernel in kernels.values()]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_sum_and_norm_in_one_pass_are_those_of_two(scaled: bool, by_row: bool) -> None:
    made, given, tokens = block(scaled), inputs(by_row), torch.randn(1, 6, 48)
    if scaled:
        given = replace(given, context=given.context.bfloat16())
    together, calls = counted(made, tokens, given)
    assert calls == ([2, 2] if scaled else [2, 0])  # the one in 8 bits is defined by the other
    made.around_attention = lambda *joined: at_once(*joined)
    apart, calls = counted(made, tokens, given)
    assert calls == [0, 0] and torch.equal(apart, together)


class Doubling(nn.Module):
    def forward(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        return tokens.mul_(2)


@pytest.mark.parametrize(("site", "left"), [("after_self_attn", 1), ("after_cross_attn", 1), ("after_ffn", 2)])
def test_what_hangs_between_two_layers_is_read_by_the_second(site: str, left: int) -> None:
    made, given, tokens = block(scaled=False), inputs(by_row=False), torch.randn(1, 6, 48)
    made.inserts[site].append(Doubling())
    out, calls = counted(made, tokens, given)
    made.around_attention = made.around_ffn = lambda *joined: at_once(*joined)
    assert calls == [left, 0] and torch.equal(counted(made, tokens, given)[0], out)


def test_without_a_norm_before_cross_attention_one_sum_stands_alone() -> None:
    made, given, tokens = block(scaled=False, cross_attn_norm=False), inputs(by_row=False), torch.randn(1, 6, 48)
    out, calls = counted(made, tokens, given)
    assert calls == [1, 0] and torch.isfinite(out).all()
