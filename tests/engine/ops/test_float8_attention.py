"""Attention in 8 bits: what the kernel is given, what it is to make of it, and what smoothed keys are for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from wan.engine.ops.attention import BACKENDS, sdpa
from wan.engine.ops.float8_attention import attend_float8, quantize_qkv


def error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def qkv(outlier: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys whose third channel has an offset in every token, as trained keys have."""
    q, k, v = (torch.randn(2, length, 3, 32) for length in (40, 56, 56))
    k[..., 2] += outlier
    return q, k, v


def test_heads_fill_the_range_of_e4m3_and_come_back_within_its_rounding() -> None:
    q, k, v = qkv()
    q[:, :, 1] *= 1e-3
    q[1, :, 2] = 0
    codes, scales = quantize_qkv(q, k, v, smooth=False)
    for x, code, scale in zip((q, k, v), codes, scales, strict=True):
        assert scale.shape == (2, 3) and code.dtype == torch.float8_e4m3fn
        back = code.float() * scale[:, None, :, None]
        # 4 bits of mantissa; the smallest numbers are 2^-9 apart.
        assert ((back - x).abs() <= torch.maximum(x.abs() / 16, scale[:, None, :, None] * 2**-10)).all()
    assert codes[0][0].float().abs().amax((0, 2)).tolist() == [448.0] * 3
    assert not codes[0][1, :, 2].float().any()


def test_attention_in_8_bits_is_close_and_smoothed_keys_keep_it_so() -> None:
    plain = qkv()
    assert error(attend_float8(*plain), sdpa(*plain)) < 0.06
    harder = qkv(outlier=60.0)
    smoothed, rough = (error(attend_float8(*harder, smooth=smooth), sdpa(*harder)) for smooth in (True, False))
    assert smoothed < 0.06 < 0.2 < rough


def test_the_kernel_gets_codes_and_the_scales_that_undo_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that multiplies in float32 then differs by the rounding of q, k, v alone; keys stay smoothed."""
    seen = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor) -> Tensor:
        seen.extend(x.dtype for x in (q, k, v))
        scales = (q_descale, k_descale, v_descale)
        values = (x.float() * s[:, None, :, None] for x, s in zip((q, k, v), scales, strict=True))
        return sdpa(*values).to(torch.bfloat16)

    package = ModuleType("fa3_fwd_interface")
    package.flash_attn_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", package)
    given = qkv(outlier=20.0)
    out = BACKENDS["flash3_fp8"].load()(*(x.to(torch.bfloat16) for x in given), None)
    assert seen == [torch.float8_e4m3fn] * 3 and out.dtype == torch.bfloat16
    assert error(out.float(), sdpa(*given)) < 0.06
