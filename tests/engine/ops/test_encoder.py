"""The text encoder's operations are those its layers were made of, and its layers ask for their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.engine.ops import encoder
from wan.engine.ops.op import computed_by
from wan.modules.t5_layers import T5FeedForward, T5LayerNorm


@torch.no_grad()
def test_layers_of_the_text_encoder_are_computed_by_the_chosen_kernels() -> None:
    norm, feed_forward, x = T5LayerNorm(8), T5FeedForward(8, 24).eval(), torch.randn(2, 3, 8)
    plain = feed_forward(norm(x))
    calls: list[tuple[torch.Size, object]] = []

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append((x.shape, eps))
        return torch.nn.functional.rms_norm(x, (8,), weight, eps)

    def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        calls.append((gate.shape, activation))
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    with computed_by({encoder.rms_norm: rms_norm, encoder.gated: gated}):
        torch.testing.assert_close(feed_forward(norm(x)), plain)
    assert calls == [((2, 3, 8), 1e-6), ((2, 3, 24), "gelu")]
