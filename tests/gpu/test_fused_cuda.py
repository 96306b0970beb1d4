"""On a GPU: the CUDA kernels against float64 at the widths of the models and at odd ones."""

from __future__ import annotations

import pytest
import torch

from wan.kernels import fused_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fused_cuda.is_built(), reason="needs CUDA kernels"),
]
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    allowed = 1.05 * HALF_ULP[out.dtype] * expected.abs() + 1e-7
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 63, 128, 1536, 3072, 4095, 5120, 32768])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(77, width, device="cuda").to(dtype)
    weight = torch.randn(width, device="cuda").to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert same(fused_cuda.rms_norm(x, weight, 1e-6), expected)
    # A view that starts 2 bytes further: no vector stands on 16 bytes.
    shifted = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x)
    assert same(fused_cuda.rms_norm(shifted, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("shape", [(512, 10240), (3, 1001)])
def test_gated(dtype: torch.dtype, activation: str, shape: tuple[int, int]) -> None:
    gate, up = (4 * torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    wide = gate.double()
    z = wide if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    assert same(fused_cuda.gated(gate, up, activation), wide * z.sigmoid() * up.double())
