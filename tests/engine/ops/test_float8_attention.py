"""Attention in 8 bits: what the kernel is given, what it is to make of it, and what smoothed keys are for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from wan.engine.ops.attention import BACKENDS, InCodes, sdpa
from wan.engine.ops.float8 import Quantized
from wan.engine.ops.float8_attention import attend_float8, quantize_qkv
from wan.engine.ops.norms import norm_rotate, norm_rotate_quantize
from wan.engine.types import Condition
from wan.modules.model import WanModel


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


def test_queries_rounded_by_a_scale_from_the_weights_serve_as_well_as_those_by_their_own() -> None:
    """Heads far apart in size, and one query whose row has all its length in one value."""
    x, weight = torch.randn(2, 40, 96), torch.rand(96) + 0.5
    weight[32:64] *= 1e-3
    x[0, 0], x[0, 0, 5] = 0.0, 3.0
    angles = torch.randn(40, 1, 16)
    rope = torch.stack((angles.cos(), angles.sin()), -1)
    q = norm_rotate(x.clone(), weight, rope, 3, 1e-6)
    coded = Quantized(*norm_rotate_quantize(x.clone(), weight, rope, 3, 1e-6), x.dtype)
    back = coded.codes.float() * coded.scale[:, None, :, None]
    assert torch.isfinite(back).all()
    for head in range(3):
        assert error(back[:, :, head], q[:, :, head]) < 0.035
    _, k, v = qkv()
    expected = sdpa(q, k, v)
    assert error(attend_float8(coded, k, v), expected) < 1.1 * error(attend_float8(q, k, v), expected)


def test_attention_that_reads_codes_gets_queries_in_codes_unless_something_is_wrapped_round_it() -> None:
    kinds: list[type] = []

    def attend(q: Tensor | Quantized, k: Tensor, v: Tensor, layout: object = None) -> Tensor:
        kinds.append(type(q))
        return attend_float8(q, k, v)

    model = WanModel(dim=96, ffn_dim=160, num_heads=3, num_layers=2, text_dim=48, freq_dim=64, text_len=12).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    x, context = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, 48)
    made = []
    for reads in (sdpa, lambda *given: attend(*given), InCodes(attend)):
        for block in model.blocks:
            block.self_attn.attend = reads  # type: ignore[union-attr]
        with torch.inference_mode():
            made.append(model.velocity(x, torch.tensor([500.0]), Condition(context=context)))
    assert kinds == [Tensor] * 2 + [Quantized] * 2
    assert error(made[2], made[0]) < 1.2 * error(made[1], made[0]) < 0.1
