"""Linear layers and what directly surrounds them: the place where they can be fused without the model knowing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.float8 import Float8Linear, quantize_rows
from wan.engine.ops.rows import may_write


def project(x: Tensor, *layers: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What every layer makes of `x`, in order. Layers that multiply in 8 bits share one quantised `x`."""
    scaled = [layer for layer in layers if isinstance(layer, Float8Linear) and layer.scaled]
    if len(scaled) == len(layers):
        codes, scale = quantize_rows(x)
        return tuple(layer.product(codes, scale, x.dtype) for layer in scaled)
    return tuple(layer(x) for layer in layers)


def linear_gelu(x: Tensor, layer: nn.Module) -> Tensor:
    """tanh-GELU of `layer(x)`, written over it where that is allowed: in a feed-forward nothing is larger.

    PyTorch's tanh-GELU on a CPU takes half as long as the matrix product before it; oneDNN computes both at once.
    """
    if _fusable(x, layer):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
        return fused
    hidden = layer(x)
    if may_write():
        return torch.ops.aten.gelu_(hidden, approximate="tanh")
    return F.gelu(hidden, approximate="tanh")


def _fusable(x: Tensor, layer: nn.Module) -> bool:
    """Whether `layer` is a plain Linear whose product with `x` nobody traces, differentiates or listens to."""
    return (
        x.device.type == "cpu"
        and type(layer) is nn.Linear
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and type(layer.weight) is nn.Parameter
        and x.dtype == layer.weight.dtype
        and _has_fused_gelu(x.dtype)
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
