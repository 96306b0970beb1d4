"""On a GPU: every Triton kernel is taken, gives its definition's values at the widths of the models, and writes all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.engine.hardware import probe
from wan.engine.ops import float8, linear, modulate, norms, video
from wan.engine.ops.op import Op
from wan.engine.ops.providers import PROVIDERS, choose, tried
from wan.engine.ops.rope import grid_table

pytestmark = pytest.mark.gpu
BF16, CUDA = torch.bfloat16, torch.device("cuda")
IN_CODES = {
    "layer_norm_quantize", "gated_add_norm_quantize", "norm_rotate_quantize", "quantize_rows", "quantize_gelu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty makes is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_all_of_them_are_taken_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = {operation.name for operation in choose("triton", probe())}
    expected = {operation.name for operation in PROVIDERS["triton"].load()}
    assert chosen == (expected if torch.cuda.get_device_capability() >= (8, 9) else expected - IN_CODES)


def cases(width: int, hidden: int) -> dict[Op[..., Any], tuple[Any, ...]]:
    """Arguments at a model's width; 333 tokens of 3 timesteps, projections side by side in one buffer."""
    x = torch.randn(1, 333, width, device=CUDA)
    y = torch.randn(1, 333, 3 * width, device=CUDA).to(BF16)[..., width : 2 * width]
    gate, weight, bias = torch.randn(1, 3, 6, width, device=CUDA).unbind(2)[:3]
    norm = modulate.Norm(weight, bias, torch.arange(333, device=CUDA) % 3, 1e-6, BF16)
    expand = nn.Linear(width, hidden, device=CUDA, dtype=BF16).requires_grad_(False)
    wide = torch.randn(1, 333, hidden, device=CUDA).to(BF16)
    frames = (
        torch.randn(1, width // 16, 3, 45, 80, device=CUDA).to(BF16).contiguous(memory_format=torch.channels_last_3d)
    )
    heads = weight[0, 0], grid_table((3, 3, 37), 128, CUDA), width // 128, 1e-6
    return {
        modulate.layer_norm: (x, norm),
        modulate.layer_norm_quantize: (x, norm),
        modulate.gated_add: (x, y, gate, norm.rows),
        modulate.gated_add_norm: (x, y, gate, norm),
        modulate.gated_add_norm_quantize: (x, y, None, norm),
        norms.norm_rotate: (y, *heads),
        norms.norm_rotate_quantize: (y, *heads),
        float8.quantize_rows: (y,),
        float8.quantize_gelu: (wide,),
        linear.linear_gelu: (y, expand),
        video.norm_silu: (frames, torch.randn(width // 16, 1, 1, 1, device=CUDA)),
        video.convolve_add: (frames, *kernel_of(width // 16), (1, 1, 1), frames),
    }


def kernel_of(channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution."""
    weight = torch.randn(channels, channels, 3, 3, 3, device=CUDA) / (27 * channels) ** 0.5
    return weight.to(BF16).contiguous(memory_format=torch.channels_last_3d), torch.randn(channels, device=CUDA).to(BF16)


@pytest.mark.parametrize(("width", "hidden"), [(1536, 8960), (3072, 14336), (5120, 13824)])
def test_values_at_the_widths_of_the_models(width: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose("triton", probe())
    for operation, args in cases(width, hidden).items():
        if operation not in chosen:
            continue

        def calls(device: torch.device, args: tuple[Any, ...] = args) -> Iterator[tuple[Any, ...]]:
            yield tuple(each.clone() if isinstance(each, Tensor) else each for each in args)

        monkeypatch.setattr(operation, "calls", calls)
        served, distance = tried(operation, chosen[operation][1], CUDA)
        assert served and distance <= operation.tolerance, (operation.name, distance)
