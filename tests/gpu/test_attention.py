"""On a GPU: every attention backend that is here against SDPA, in parts too, and 8 bits against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan.engine.hardware import probe
from wan.engine.ops.attention import BACKENDS, is_exact, sdpa
from wan.engine.ops.attention_kernels import merge
from wan.engine.ops.float8 import Quantized
from wan.engine.ops.float8_attention import attend_float8, quantize_heads

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def qkv(keys: int = 1111) -> list[Tensor]:
    return [torch.randn(2, length, 3, 128, device="cuda").to(BF16) for length in (777, keys, keys)]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_gives_attention_whole_and_from_halves_of_the_keys(name: str) -> None:
    backend = BACKENDS[name]
    refusal = backend.refusal(probe(), BF16, 128)
    if refusal is not None:
        pytest.skip(str(refusal))
    q, k, v = qkv()
    exact = sdpa(q.double(), k.double(), v.double())
    limit = 1e-2 if is_exact(name) else 0.1
    assert error(backend.load()(q, k, v, None), exact) < limit
    if backend.load_lse is not None:
        attend = backend.load_lse()
        out, _ = merge([attend(q, k[:, :500], v[:, :500]), attend(q, k[:, 500:], v[:, 500:])])
        assert error(out, exact) < limit


def test_the_kernel_in_8_bits_is_its_definition() -> None:
    backend = BACKENDS["flash3_fp8"]
    refusal = backend.refusal(probe(), BF16, 128)
    if refusal is not None:
        pytest.skip(str(refusal))
    q, k, v = qkv()
    k[..., 5] += 30
    coded = Quantized(*quantize_heads(q), BF16)
    for asked, exact in ((q, q.float()), (coded, coded)):
        out = backend.attend()(asked, k, v, None)
        # Probabilities are rounded by the largest score so far, and the output to bfloat16.
        assert error(out, attend_float8(exact, k.float(), v.float())) < 2e-2
        assert error(out, sdpa(q.double(), k.double(), v.double())) < 0.1
