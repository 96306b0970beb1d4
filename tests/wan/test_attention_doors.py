"""Upstream's `flash_attention` and `attention` work on any device and honour every argument."""

from __future__ import annotations

import pytest
import torch

from wan.modules import flash_attention
from wan.modules.attention import attention


@pytest.mark.parametrize("door", [flash_attention, attention])
def test_the_door_gives_attention_in_the_dtype_of_q(door) -> None:  # type: ignore[no-untyped-def]
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 6, 2, 16), torch.randn(2, 6, 2, 16)
    k_lens = torch.tensor([6, 3])
    out = door(q, k, v, k_lens=k_lens, softmax_scale=0.3, q_scale=2.0)
    for b, length in enumerate(k_lens.tolist()):
        keys, values = (x[b, :length].repeat_interleave(2, 1) for x in (k, v))
        weights = torch.einsum("lnd,snd->nls", q[b] * 2.0, keys).mul(0.3).softmax(-1)
        torch.testing.assert_close(out[b], torch.einsum("nls,snd->lnd", weights, values), rtol=1e-5, atol=1e-6)
    assert out.dtype == torch.float32
    assert door(q.bfloat16(), k, v).dtype == torch.bfloat16


def test_causal_attention_sees_no_later_key() -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 16)
    out = flash_attention(q, k, v, causal=True)
    changed = torch.cat((v[:, :3], torch.randn(1, 3, 2, 16)), 1)
    torch.testing.assert_close(flash_attention(q, k, changed, causal=True)[:, :3], out[:, :3])


def test_a_version_that_is_not_installed_is_no_obstacle() -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 16)
    torch.testing.assert_close(flash_attention(q, k, v, version=3), flash_attention(q, k, v))
