"""What the compiler makes of every Triton kernel, for cards that need not be there: nothing spills, loads are wide.

Shapes are those of the published models: 5120 wide (14B), 3072 (5B), 1536 (1.3B), hidden layers of 13824, frames of a
VAE with 96 to 1024 channels. Code depends on them only by the power of two above, so the widest stands for its like.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BF16 = torch.bfloat16
LAST = {"memory_format": torch.channels_last_3d}

Call = Callable[[SimpleNamespace], Any]


def residual(kernels: SimpleNamespace) -> None:
    x, y = torch.empty(1, 2, 5120), torch.empty(1, 2, 5120, dtype=BF16)
    gate, weight, bias = torch.empty(1, 1, 6, 5120).unbind(2)[:3]
    kernels.modulate.gated_add_norm(x, y, gate, (weight, bias, None, 1e-6, BF16))


def residual_by_row(kernels: SimpleNamespace) -> None:
    x, y = torch.empty(1, 2, 3072, dtype=BF16), torch.empty(1, 2, 3072, dtype=BF16)
    gate, weight, bias = torch.empty(1, 2, 6, 3072).unbind(2)[:3]
    kernels.modulate.gated_add_norm(x, y, gate, (weight, bias, torch.tensor([0, 1]), 1e-6, BF16))


def norm_in_codes(kernels: SimpleNamespace) -> None:
    weight, bias = torch.empty(1, 1, 6, 5120).unbind(2)[:2]
    kernels.modulate.layer_norm_quantize(torch.empty(1, 2, 5120), (weight, bias, None, 1e-6, BF16))


def heads(kernels: SimpleNamespace) -> None:
    q = torch.empty(1, 2, 3 * 5120, dtype=BF16)[..., :5120]
    kernels.rope.norm_rotate(q, torch.empty(5120), torch.empty(2, 1, 64, 2), 40, 1e-6)


def heads_in_codes(kernels: SimpleNamespace) -> None:
    q = torch.empty(1, 2, 3 * 5120, dtype=BF16)[..., :5120]
    kernels.rope.norm_rotate_quantize(q, torch.empty(5120), torch.empty(2, 1, 64, 2), 40, 1e-6)


def hidden_in_codes(kernels: SimpleNamespace) -> None:
    kernels.quantize.quantize_gelu(torch.empty(2, 13824, dtype=BF16))


def norm_and_silu(kernels: SimpleNamespace) -> None:
    x, wider = (torch.empty(1, 384, frames, 4, 64, dtype=BF16).contiguous(**LAST) for frames in (2, 4))
    kernels.video.norm_silu(x, torch.empty(384, 1, 1, 1), wider[:, :, 2:])


def bias_and_residual(kernels: SimpleNamespace) -> None:
    x, y = (torch.empty(1, 96, 2, 4, 64, dtype=BF16).contiguous(**LAST) for _ in range(2))
    kernels.video.add_bias(x, torch.empty(96, dtype=BF16), y)


IN_CODES = (norm_in_codes, heads_in_codes, hidden_in_codes)
ON_HOPPER = [(90, call) for call in (residual, residual_by_row, heads, norm_and_silu, bias_and_residual, *IN_CODES)]
ON_AMPERE = [(80, call) for call in (residual, heads, norm_and_silu)]


@pytest.mark.parametrize(("sm", "call"), ON_HOPPER + ON_AMPERE, ids=lambda value: getattr(value, "__name__", value))
def test_nothing_spills_and_global_memory_is_read_16_bytes_at_a_time(
    code_for: Callable[[int, Call], Any], sm: int, call: Call
) -> None:
    """A vector of the channels is read once a program, by threads that have one or two of them each."""
    code = code_for(sm, call)
    assert code.stack == code.local == 0
    assert code.registers <= 72
    assert code.shared <= 4096
    wide = [width for width in code.loads if width == 16]
    assert len(code.loads) - len(wide) <= (1 if call in (residual_by_row, norm_and_silu, bias_and_residual) else 0)
    assert len(wide) >= 2
    assert [width for width in code.stores if width != 16] == ([4] if call in IN_CODES else [])
