"""Linear layers and what directly surrounds them: the place where they can be fused without the model knowing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Joined:
    """`project` for layers whose weights lie side by side in memory: one product instead of one for each.

    The weights stay the layers' own parameters, views of one tensor. Where another form has taken a layer's place, or
    other memory a weight's (a LoRA's, while it computes), the layers are called one by one.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Puts the weights side by side, unless they are."""
        self._layers = tuple(layers)
        self._sizes = [layer.out_features for layer in layers]
        with torch.inference_mode(False), torch.no_grad():
            self._whole = nn.Linear(layers[0].in_features, sum(self._sizes), device="meta")
            self._whole.weight = _side_by_side([layer.weight for layer in layers])
            self._whole.bias = _side_by_side([layer.bias for layer in layers])
        self._places = self._where()

    @staticmethod
    def can_join(layers: Sequence[nn.Module]) -> bool:
        """Whether these are plain layers of one width, dtype and device."""
        plain = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is not None]
        kinds = {(layer.in_features, layer.weight.dtype, layer.bias.dtype, layer.weight.device) for layer in plain}
        return len(plain) == len(layers) and len(kinds) == 1

    def __call__(self, x: Tensor | Quantized, *layers: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        if layers != self._layers or isinstance(x, Quantized) or self._where() != self._places:
            return project(x, *layers)
        return linear(x, self._whole).split(self._sizes, dim=-1)

    def _where(self) -> list[int]:
        return [each.data_ptr() for layer in self._layers for each in (layer.weight, layer.bias)]


def _side_by_side(tensors: Sequence[Tensor]) -> nn.Parameter:
    """All of them along dim 0 in one piece of memory, of which they are views from now on."""
    first, sizes = tensors[0], [len(each) for each in tensors]
    ends = [each.data_ptr() + each.nbytes for each in tensors]
    one = len({each.untyped_storage().data_ptr() for each in tensors}) == 1
    if one and all(each.data_ptr() == end for each, end in zip(tensors[1:], ends, strict=False)):
        return nn.Parameter(first.as_strided((sum(sizes), *first.shape[1:]), first.stride()), requires_grad=False)
    whole = torch.cat(list(tensors))
    for tensor, part in zip(tensors, whole.split(sizes), strict=True):
        tensor.data = part
    return nn.Parameter(whole, requires_grad=False)


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
