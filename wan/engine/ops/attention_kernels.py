"""How each attention kernel is called: `attend` over [B, L, N, D], and with the log-sum-exp of its scores.

With the latter [B, N, L], parts of the keys may be attended to one after the other, or on several cards, and joined
by `merge`. Packages are imported when a kernel is loaded.

Letters: B batch, L query tokens, S key tokens, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.engine.ops.float8 import Quantized
from wan.engine.ops.float8_attention import quantize_qkv
from wan.engine.types import Layout

__all__ = ["Attend", "AttendLse", "InCodes", "merge", "sdpa"]

Attend = Callable[..., Tensor]
"""`(q, k, v, layout=None) -> out`: q [B, L, N, D], k and v [B, S, N, D], out [B, L, N, D], never padded."""
AttendLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(q, k, v) -> out, lse`: lse [B, N, L], float32, is the logarithm of the sum of a query's exponentials."""


@dataclass(frozen=True)
class InCodes:
    """An attention whose queries may be `Quantized` already, by head; what is wrapped round it gets plain ones."""

    attend: Callable[..., Tensor]

    def __call__(self, q: Tensor | Quantized, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
        return self.attend(q, k, v, layout)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """PyTorch's scaled dot product attention; the definition that every backend is compared with."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sdpa_lse() -> AttendLse:
    """The kernel inside SDPA that tells the sum, FlashAttention 2 on CUDA."""
    aten = torch.ops.aten

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kernel = (
            aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
        )
        out, lse, *_ = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2), lse

    return attend


def cudnn() -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return attend


def cudnn_lse() -> AttendLse:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True)
        return out.transpose(1, 2), lse.view(lse.shape[:3])

    return attend


def _first(result: Any) -> Tensor:
    """The output of a kernel that, by version, returns it alone or with the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _flash_lse(kernel: Callable[..., Any]) -> AttendLse:
    """FlashAttention gives the sums along with what it calls probabilities, of which it gives none."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = kernel(q, k, v, return_attn_probs=True)
        return out, lse

    return attend


def flash2() -> Attend:
    from flash_attn import flash_attn_func

    return lambda q, k, v, layout=None: _first(flash_attn_func(q, k, v))


def flash2_lse() -> AttendLse:
    from flash_attn import flash_attn_func

    return _flash_lse(flash_attn_func)


def _flash3() -> Callable[..., Any]:
    """FlashAttention 3 as `fa3-fwd` brings it, or as built from the original's hopper/ folder."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from flash_attn_interface import flash_attn_func
    return flash_attn_func


def flash3() -> Attend:
    kernel = _flash3()
    return lambda q, k, v, layout=None: _first(kernel(q, k, v))


def flash3_lse() -> AttendLse:
    return _flash_lse(_flash3())


def flash3_fp8() -> Attend:
    kernel = _flash3()

    def attend(q: Tensor | Quantized, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
        codes, scales = quantize_qkv(q, k, v)
        named = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
        return _first(kernel(*codes, **named)).to(q.dtype)

    return attend


def sage() -> Attend:
    from sageattention import sageattn

    return lambda q, k, v, layout=None: _first(sageattn(q, k, v, tensor_layout="NHD", is_causal=False))


def sage_lse() -> AttendLse:
    from sageattention import sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = sageattn(q, k, v, tensor_layout="NHD", is_causal=False, return_lse=True)
        return out, lse

    return attend


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What attention to all keys gives, from (out, lse) of attention to parts of them; out as the first's dtype."""
    sums = torch.stack([lse for _, lse in parts])
    lse = sums.logsumexp(0)
    shares = (sums - lse).exp().transpose(2, 3).unsqueeze(-1)
    first, *others = parts
    total = first[0].float() * shares[0]
    for (out, _), share in zip(others, shares[1:], strict=True):
        total.addcmul_(out.float(), share)
    return total.to(first[0].dtype), lse
