"""Weights in 8 bits: e4m3 codes (four bits of exponent, three of mantissa), a scale for each row, layers on them.

A row's largest magnitude becomes 448, the largest e4m3 number, so that weight = codes * scale up to rounding.
Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wan.engine.ops.op import Draw, op
from wan.engine.ops.rows import may_write

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = torch.finfo(torch.float32).tiny
"""Scale of a row of zeros, which then are zeros in 8 bits too."""
MULTIPLE = 16
"""What both sides of a matrix must be multiples of for `torch._scaled_mm`."""
PIECE = 2**24
"""Weights are quantised this many elements at a time: what it takes beside them stays small."""


class Quantized(NamedTuple):
    """Rows that enter a linear layer, quantised already, and the dtype they had."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype


def _examples(draw: Draw) -> list[tuple[Tensor]]:
    return [(draw(2, 3, 1536, dtype=torch.bfloat16),), (draw(5, 384) * 1e-3,)]


@op(examples=_examples, tolerance=5e-3)
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x [..., D] as e4m3 codes and float32 scales [..., 1]."""
    scale = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=TINY)
    return (x / scale).to(E4M3), scale


@op(examples=_examples, tolerance=5e-3)
def quantize_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of x's tanh-GELU; x may be written."""
    return quantize_rows(gelu_over(x))


def gelu_over(x: Tensor) -> Tensor:
    """tanh-GELU of x, written over it where that is allowed."""
    if may_write():
        return torch.ops.aten.gelu_(x, approximate="tanh")
    return F.gelu(x, approximate="tanh")


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of a weight [out, in]; one that was stored in e4m3 keeps its codes."""
    if isinstance(weight, Coded):
        return weight.rows()
    codes = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    step = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        codes[rows], scale[rows] = quantize_rows(weight[rows])
    return codes, scale


class Coded(Tensor):
    """A weight as a file stores it in 8 bits. Whatever is done to it is done to float32 codes * scale, made for that.

    `codes` are e4m3 or e5m2; `scale`, float32, has as many dims and one number, or one for each row.
    """

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Coded:
        made: Coded = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        plain = [tree_map_only(Coded, Coded.numbers, each) for each in (args, dict(kwargs or {}))]
        return func(*plain[0], **plain[1])

    def numbers(self) -> Tensor:
        """The weight, float32."""
        return self.codes.float().mul_(self.scale)

    def on(self, device: torch.device) -> Coded:
        """The same on a device, moved as it is stored."""
        return Coded(self.codes.to(device), self.scale.to(device))

    def rows(self) -> tuple[Tensor, Tensor]:
        """The same numbers as e4m3 codes and one scale a row, [out, 1].

        e5m2 has fewer digits and more range: divided by a power of two it loses only what is 2^15 times smaller than
        its row's largest.
        """
        scale = self.scale.expand(len(self.codes), 1)
        if self.codes.dtype == E4M3:
            return self.codes, scale.contiguous()
        values = self.codes.float()
        largest = values.abs().amax(-1, keepdim=True).clamp(min=2.0**-16)
        power = (largest / LARGEST).log2().ceil().exp2()
        return (values / power).to(E4M3), scale * power


@torch.library.custom_op("wan::expand_rows", mutates_args=())
def expand_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale in `dtype`, rounded once.

    One operation also to torch.compile: Triton has no e4m3 on cards older than sm_89, PyTorch's own kernels do.
    """
    return codes.to(dtype).mul_(scale)


@expand_rows.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def scaled_product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """bfloat16 [M, N] of quantised rows [M, K] and weight [N, K]: products of e4m3, summed and scaled in float32.

    On CUDA this is `card_product`; elsewhere the same arithmetic in float32, to check it by.
    """
    bias = None if bias is None else bias.to(torch.bfloat16)
    if codes.is_cuda:
        return card_product(codes, scale, weight, weight_scale, bias)
    out = torch.mm(codes.float(), weight.float().t()) * scale * weight_scale.t()
    return (out if bias is None else out + bias).to(torch.bfloat16)


def card_product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`scaled_product` by PyTorch's own operation, which newer versions have on the CPU too."""
    return torch._scaled_mm(
        codes, weight.t(), scale_a=scale, scale_b=weight_scale.t(), bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


def scaled_refusal(device: torch.device) -> str | None:
    """Why this PyTorch cannot multiply scaled rows on this CUDA device; None where it can. It is tried."""
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
    codes, scale = quantize_rows(ones)
    try:
        out = scaled_product(codes, scale, codes, scale, None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    wrong = not torch.allclose(out.float(), torch.full_like(ones, MULTIPLE), rtol=1e-2)
    return "its product of ones is wrong" if wrong else None


class Float8Linear(nn.Module):
    """A linear layer whose weight is e4m3 codes [out, in] under `weight` and scales [out, 1] under `weight_scale`.

    Plain, the weight is made anew in the input's dtype for every call. `scaled` also quantises the input, row by row,
    and multiplies in 8 bits, where the sizes of the layer allow.
    """

    def __init__(self, layer: nn.Linear, *, scaled: bool = False) -> None:
        """In place of `layer`, on its device; codes and scales are yet to be filled."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        """The dtype it computes in, which `layer` was stored in."""
        self.scaled = scaled and self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0
        device = layer.weight.device
        self.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=E4M3, device=device), requires_grad=False)
        scale = torch.empty(self.out_features, 1, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Quantized):
            return self.product(*x)
        if self.scaled:
            return self.product(*quantize_rows(x), x.dtype)
        return F.linear(x, expand_rows(self.weight, self.weight_scale, x.dtype), self.bias)

    def product(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """What the layer makes of an input that is quantised already, in `dtype`."""
        out = scaled_product(
            codes.flatten(0, -2), scale.flatten(0, -2), self.weight, self.weight_scale, self.bias
        )  # fmt: skip
        return out.unflatten(0, codes.shape[:-1]).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scaled={self.scaled}"


def all_scaled(layers: Iterable[object]) -> bool:
    """Whether all of these layers multiply in 8 bits, and may be given `Quantized` rows."""
    return all(isinstance(layer, Float8Linear) and layer.scaled for layer in layers)
