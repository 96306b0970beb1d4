"""What the card can do at best: copies, matrix products, attention and convolutions alone, at the sizes of the models.

Everything else is told of these, as clocks fall under load and data sheets are reached by nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from limits.book import Act, Book, Row, Work, distance
from torch import Tensor

from wan.engine.hardware import Hardware
from wan.engine.ops.attention import BACKENDS, fault
from wan.engine.ops.float8 import quantize_rows, scaled_product

BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows of a product, width and hidden width; (tokens, heads) of attention; bytes of a copy; channels of a VAE."""

    tokens: int
    dim: int
    wide: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    head_dim: int
    copy_bytes: int
    channels: tuple[int, ...]
    area: int


REAL = Sizes(
    tokens=75600, dim=5120, wide=(5120, 13824, 15360), attention=((27280, 24), (32760, 40), (75600, 40)), head_dim=128,
    copy_bytes=2**30, channels=(96, 192, 384, 256, 512, 1024), area=160 * 90,
)  # fmt: skip
SMOKE = Sizes(
    tokens=48, dim=64, wide=(64, 96), attention=((40, 2),), head_dim=64, copy_bytes=2**16, channels=(16,), area=36
)


def measure(book: Book, hardware: Hardware, sizes: Sizes, runs: int) -> None:
    """All ceilings, most of a minute on a large card."""
    book.race(dict(copies(book.device, sizes)), runs)
    for wide in sizes.wide:
        book.race(dict(products(book.device, sizes, wide)), runs)
    for tokens, heads in sizes.attention:
        attention(book, hardware, sizes.head_dim, tokens, heads, runs)
    for channels in sizes.channels:
        book.race(dict(convolutions(book.device, channels, sizes.area)), runs)


def copies(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, tuple[Act, Work]]]:
    """Within the device's memory, and from pinned memory where there is a device beside the CPU."""
    source = torch.randint(255, (sizes.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield "copy/device", (lambda: target.copy_(source), Work(bytes=2 * sizes.copy_bytes))
    if device.type == "cuda":
        pinned = source.cpu().pin_memory()
        yield "copy/pinned", (lambda: target.copy_(pinned, non_blocking=True), Work(bytes=sizes.copy_bytes))
        beside, matrix = torch.cuda.Stream(device), torch.randn(8192, 8192, device=device).to(BF16)

        def while_computing() -> None:
            """The products take less time than the copy: what is timed is the copy."""
            here = torch.cuda.current_stream(device)
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                target.copy_(pinned, non_blocking=True)
            for _ in range(8):
                torch.mm(matrix, matrix)
            here.wait_stream(beside)

        yield "copy/pinned beside products", (while_computing, Work(bytes=sizes.copy_bytes))


def products(device: torch.device, sizes: Sizes, wide: int) -> Iterator[tuple[str, tuple[Act, Work]]]:
    """[tokens, dim] x [dim, wide] in bf16, in 8 bits by row and by tensor, and with a GELU behind or inside."""
    x = torch.randn(sizes.tokens, sizes.dim, device=device).to(BF16)
    weight = torch.randn(wide, sizes.dim, device=device).to(BF16) / sizes.dim**0.5
    bias = torch.randn(wide, device=device).to(BF16)
    work = Work(flop=2.0 * sizes.tokens * sizes.dim * wide)
    (xc, xs), (wc, ws), one = quantize_rows(x), quantize_rows(weight), torch.ones((), device=device)
    yield f"gemm/bf16/{wide}", (lambda: F.linear(x, weight, bias), work)
    yield f"gemm/fp8 rows/{wide}", (lambda: scaled_product(xc, xs, wc, ws, bias), work)
    tensorwise = {"scale_a": one, "scale_b": one, "out_dtype": BF16, "use_fast_accum": True}
    yield f"gemm/fp8 tensor/{wide}", (lambda: torch._scaled_mm(xc, wc.t(), **tensorwise), work)

    def behind() -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def inside() -> Tensor:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    yield f"gemm/gelu behind/{wide}", (behind, work)
    same = Work(flop=work.flop, distance=distance(inside()[:64], behind()[:64]))
    yield f"gemm/gelu inside/{wide}", (inside, same)


def attention(book: Book, hardware: Hardware, head_dim: int, tokens: int, heads: int, runs: int) -> None:
    """Every backend that is here, after it has given SDPA's values; why one is not is a row."""
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device=book.device).to(BF16) for _ in range(3))
    work = Work(flop=4.0 * tokens**2 * heads * head_dim)
    acts: dict[str, tuple[Act, Work]] = {}
    for name, backend in BACKENDS.items():
        refusal = backend.refusal(hardware, BF16, head_dim)
        why = str(refusal) if refusal is not None else fault(backend, hardware.device, BF16, head_dim)
        if why:
            book.add(Row(key=f"attention/{name}/{tokens}", work=work, failed=why))
            continue
        attend = backend.load()
        acts[f"attention/{name}/{tokens}"] = (lambda attend=attend: attend(q, k, v)), work  # type: ignore[misc]
    book.race(acts, runs)


def convolutions(device: torch.device, channels: int, area: int) -> Mapping[str, tuple[Act, Work]]:
    """3x3x3 in bf16 channels-last over four frames, against 3x3 of three times the channels: the same FLOP."""
    side = int(area**0.5)
    space, plane = torch.channels_last_3d, torch.channels_last
    x3 = torch.randn(1, channels, 6, side, side, device=device).to(BF16).to(memory_format=space)
    w3 = torch.randn(channels, channels, 3, 3, 3, device=device).to(BF16).to(memory_format=space)
    x2 = torch.randn(4, 3 * channels, side, side, device=device).to(BF16).to(memory_format=plane)
    w2 = torch.randn(channels, 3 * channels, 3, 3, device=device).to(BF16).to(memory_format=plane)
    work = Work(flop=2.0 * 27 * channels**2 * 4 * side**2)
    return {
        f"conv3d/bf16/{channels}": (lambda: F.conv3d(x3, w3, padding=(0, 1, 1)), work),
        f"conv2d/bf16/{channels}": (lambda: F.conv2d(x2, w2, padding=1), work),
    }


def settle(device: torch.device, seconds: float) -> None:
    """Keep the card busy until its clock is the one that it holds."""
    x = torch.randn(4096, 4096, device=device).to(BF16)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for _ in range(50):
            x = F.normalize(x @ x, dim=-1)
        float(x[0, 0])
