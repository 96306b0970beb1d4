"""Linear layers and what directly surrounds them: the place where they can be fused without the model knowing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.float8 import Quantized, all_scaled, gelu_over, quantize_gelu, quantize_rows
from wan.engine.ops.op import Draw, op
from wan.engine.ops.rows import may_write


def project(x: Tensor | Quantized, *layers: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """What every layer makes of `x`, in order. Layers that multiply in 8 bits share one quantised `x`."""
    if not isinstance(x, Quantized) and all_scaled(layers):
        x = Quantized(*quantize_rows(x), x.dtype)
    return tuple(linear(x, layer) for layer in layers)


def gelu_between(x: Tensor | Quantized, expand: nn.Module, contract: nn.Module) -> Tensor | Quantized:
    """tanh-GELU of `expand(x)`, quantised where `contract`, which reads it, multiplies in 8 bits as `expand` does."""
    if not all_scaled((expand, contract)):
        return linear_gelu(x, expand)
    hidden: Tensor = expand(x)
    return Quantized(*quantize_gelu(hidden), hidden.dtype)


def _examples(draw: Draw) -> list[tuple[Any, ...]]:
    layer = nn.Linear(64, 192, device="meta")
    layer.weight = nn.Parameter(draw(192, 64, dtype=torch.bfloat16), requires_grad=False)
    layer.bias = nn.Parameter(draw(192, dtype=torch.bfloat16), requires_grad=False)
    return [(draw(2, 40, 64, dtype=torch.bfloat16) * 0.1, layer)]


@op(examples=_examples, tolerance=1e-2)
def linear(x: Tensor | Quantized, layer: Callable[..., Tensor]) -> Tensor:
    """`layer(x)`."""
    return layer(x)


def linear_onednn(x: Tensor | Quantized, layer: Callable[..., Tensor]) -> Tensor:
    """`linear` in bfloat16 on a CPU with the bias added while the product is in registers; PyTorch copies it first."""
    if isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype == torch.bfloat16 and _plain(layer, x):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
        return made
    return NotImplemented


@op(examples=_examples, tolerance=1e-2)
def linear_gelu(x: Tensor | Quantized, layer: nn.Module) -> Tensor:
    """tanh-GELU of `layer(x)`, written over it where that is allowed: in a feed-forward nothing is larger.

    PyTorch's tanh-GELU on a CPU takes half as long as the matrix product before it; oneDNN computes both at once.
    """
    if isinstance(x, Tensor) and x.device.type == "cpu" and _plain(layer, x) and _has_fused_gelu(x.dtype):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
        return fused
    return gelu_over(layer(x))


def linear_gelu_cublas(x: Tensor | Quantized, layer: nn.Module) -> Tensor:
    """`linear_gelu` as the end of cuBLASLt's matrix product: the hidden layer is rounded once and written once."""
    if isinstance(x, Tensor) and x.is_cuda and _plain(layer, x) and layer.bias is not None:
        flat = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])
    return NotImplemented


def _plain(layer: object, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether `layer` is a plain Linear whose product with `x` nobody traces, differentiates or listens to."""
    return (
        type(layer) is nn.Linear
        and may_write()
        and not torch.is_autocast_enabled(x.device.type)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and type(layer.weight) is nn.Parameter
        and x.dtype == layer.weight.dtype
    )


@cache
def _has_fused_gelu(dtype: torch.dtype) -> bool:
    """Whether this processor and this PyTorch have the fused operation; it is internal, so it is tried."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x = torch.linspace(-3, 3, 256, device="cpu").to(dtype).view(8, 32)
    bias = torch.zeros(8, dtype=dtype, device="cpu")
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, x, bias, "gelu", [], "tanh")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(out.float(), F.gelu(F.linear(x, x), approximate="tanh").float(), rtol=0.05, atol=0.05)
