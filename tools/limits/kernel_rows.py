"""Each operation that has kernels, at the size of 14B at 720p or of the text encoder: its definition and its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from limits.book import Act, Book, Work, distance
from torch import Tensor

from wan.engine.hardware import Hardware
from wan.engine.ops import encoder, float8, modulate, norms, video
from wan.engine.ops.op import Op
from wan.engine.ops.providers import PROVIDERS, working
from wan.engine.ops.rope import grid_table

BF16 = torch.bfloat16
Make = Callable[["Draw"], tuple[Any, ...]]


class Draw:
    """Arguments of one size on one device."""

    def __init__(self, device: torch.device, grid: tuple[int, int, int], heads: int, head_dim: int) -> None:
        self.device, self.grid, self.heads, self.head_dim = device, grid, heads, head_dim
        self.tokens, self.dim = grid[0] * grid[1] * grid[2], heads * head_dim

    def half(self, *shape: int) -> Tensor:
        return torch.randn(*(shape or (1, self.tokens, self.dim)), device=self.device).to(BF16)

    def stream(self) -> Tensor:
        return torch.randn(1, self.tokens, self.dim, device=self.device)

    def tables(self) -> tuple[Tensor, modulate.Norm]:
        """Gate, and how what comes next is normed, of one timestep."""
        gate, weight, bias = torch.randn(3, 1, 1, self.dim, device=self.device)
        return gate, modulate.Norm(weight, bias, None, 1e-6, BF16)


def _joined(draw: Draw) -> tuple[Any, ...]:
    """Frames with two of the past in front, a convolution of them, and what is added to it; bias and sum are timed with
    the convolution, which nobody would call without them."""
    width, (frames, *place) = draw.dim // 16, draw.grid
    place = [4 * side for side in place]
    x, other = draw.half(1, width, frames + 2, *place), draw.half(1, width, frames, *place)
    x, weight, other = (
        each.contiguous(memory_format=torch.channels_last_3d)
        for each in (x, 0.02 * draw.half(width, width, 3, 3, 3), other)
    )
    return x, weight, draw.half(width), (0, 1, 1), other


CASES: Mapping[Op[..., Any], tuple[Make, int]] = {
    modulate.layer_norm: (lambda draw: (draw.stream(), draw.tables()[1]), 4 + 2),
    modulate.layer_norm_quantize: (lambda draw: (draw.stream(), draw.tables()[1]), 4 + 1),
    modulate.gated_add: (lambda draw: (draw.stream(), draw.half(), draw.tables()[0], None), 4 + 2 + 4),
    modulate.gated_add_norm: (
        lambda draw: (draw.stream(), draw.half(), *draw.tables()),
        4 + 2 + 4 + 2,
    ),
    modulate.gated_add_norm_quantize: (
        lambda draw: (draw.stream(), draw.half(), *draw.tables()),
        4 + 2 + 4 + 1,
    ),
    norms.norm_rotate: (
        lambda draw: (
            draw.half(), draw.half(draw.dim), grid_table(draw.grid, draw.head_dim, draw.device), draw.heads, 1e-6,
        ),
        2 + 2,
    ),
    norms.norm_rotate_quantize: (
        lambda draw: (
            draw.half(), draw.half(draw.dim), grid_table(draw.grid, draw.head_dim, draw.device), draw.heads, 1e-6,
        ),
        2 + 1,
    ),
    float8.quantize_rows: (lambda draw: (draw.half(),), 2 + 1),
    float8.quantize_gelu: (lambda draw: (draw.half(),), 2 + 1),
    video.norm_silu: (
        lambda draw: (
            draw.half(1, draw.dim // 16, draw.grid[0], 4 * draw.grid[1], 4 * draw.grid[2])
            .contiguous(memory_format=torch.channels_last_3d), torch.ones(draw.dim // 16, 1, 1, 1, device=draw.device),
        ),
        2 + 2,
    ),
    video.convolve_add: (lambda draw: _joined(draw), 2 + 2 + 6),
    encoder.rms_norm: (lambda draw: (draw.half(), draw.half(draw.dim), 1e-6), 2 + 2),
    encoder.gated: (lambda draw: (draw.half(), draw.half(), "gelu"), 2 + 2 + 2),
}  # fmt: skip
"""Operation -> its arguments, and bytes per value of a stream that it cannot do without reading or writing."""

OVER_BF16 = (lambda draw: (draw.half(), draw.half(), *draw.tables()), 2 + 2 + 2 + 2)
"""`gated_add_norm` where the residual stream is bfloat16 too."""

UNWRITTEN: Mapping[Op[..., Any], Callable[..., Any]] = {
    float8.quantize_gelu: lambda x: float8.quantize_rows(F.gelu(x, approximate="tanh")),
}
"""Definitions that write their input, as they are where it is still needed: the kernel does not write it either."""

REAL = ((21, 45, 80), 40, 128)
"""Token grid, heads and head width of 14B at 1280x720, 81 frames."""
SMOKE = ((3, 4, 5), 2, 24)


def measure(book: Book, hardware: Hardware, size: tuple[tuple[int, int, int], int, int], runs: int) -> None:
    """One race an operation: its definition and everybody's kernel that is right here."""
    cases = [(operation.name, operation, *case) for operation, case in CASES.items()]
    cases.append(("gated_add_norm over bf16", modulate.gated_add_norm, *OVER_BF16))
    for name, operation, make, bytes_per_value in cases:
        draw = Draw(hardware.device, *size)
        args = make(draw)
        plain = UNWRITTEN.get(operation, operation.definition)
        moved = float(bytes_per_value * draw.tokens * draw.dim)
        acts: dict[str, tuple[Act, Work]] = {f"kernel/{name}/torch": (lambda p=plain, a=args: p(*a), Work(bytes=moved))}  # type: ignore[misc]
        for provider, kernel in kernels_of(operation, hardware):
            apart = distance(_first(kernel(*make_like(args))), _first(operation.definition(*make_like(args))))
            acts[f"kernel/{name}/{provider}"] = (
                lambda k=kernel, a=args: k(*a), Work(bytes=moved, distance=apart)
            )  # type: ignore[misc]  # fmt: skip
        book.race(acts, runs)


def kernels_of(operation: Op[..., Any], hardware: Hardware) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Provider's name and kernel, of those that run here and give the definition's values."""
    for name, provider in PROVIDERS.items():
        if provider.refusal(hardware) is None and operation in (table := working(provider, hardware.device)):
            yield name, table[operation]


def make_like(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in memory of their own: an operation may write its input."""
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in args)


def _first(result: Any) -> Tensor:
    return result[0].float() if isinstance(result, tuple) else result.float()
