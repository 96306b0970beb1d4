"""What is alive is counted: storages once, views never, from the making to the last reference."""

from __future__ import annotations

import torch
from torch import Tensor

from wan.engine.live_bytes import LiveBytes, peak_live_bytes


def test_a_storage_counts_from_its_making_to_its_last_reference() -> None:
    outside = torch.empty(10, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        a = torch.empty(100, device="meta")
        view = a.view(10, 10)[3:]
        outside.add_(1)
        assert live.now == 400
        del a
        assert live.now == 400  # the view holds it
        b = view * 2
        assert live.now == 400 + 280
        del view
        assert live.now == 280
        del b
    assert (live.now, live.peak) == (0, 680)
    assert {name for name, _, _ in live.at_peak} == {"aten.empty.memory_format", "aten.mul.Tensor"}


def test_attention_on_the_meta_device_is_one_fused_kernel() -> None:
    """Its output and a float32 for every query, not the scores; and the output lies as the queries do."""
    q = torch.empty(2, 1000, 3, 8, dtype=torch.bfloat16, device="meta")

    def attend() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
        assert out.transpose(1, 2).is_contiguous()

    assert peak_live_bytes(attend) == q.nbytes + 4 * 2 * 1000 * 3


def test_the_meta_device_shows_what_real_memory_would() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8))
    layer.requires_grad_(False)
    x = torch.randn(50, 8)
    on_meta = layer.to("meta")

    def run(module: torch.nn.Module, x: Tensor) -> int:
        return peak_live_bytes(lambda: module(x))

    assert run(on_meta, x.to("meta")) == 50 * 64 * 4 * 2
    assert run(torch.nn.Sequential(*layer).to_empty(device="cpu"), x) == 50 * 64 * 4 * 2
