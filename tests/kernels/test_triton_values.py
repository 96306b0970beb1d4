"""Every Triton kernel against float64, in the interpreter: odd sizes, rows apart in memory, outputs full of NaN before.

Tolerances are float32's for what is stored so, and half a unit of the last place where a kernel rounds to less.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from wan.engine.ops.op import Op
from wan.engine.ops.providers import PROVIDERS, tried

BF16 = torch.bfloat16


def bound(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a number of `dtype` may be from float64's: rounded once, after float32 arithmetic."""
    half_unit = 2.0**-8 if dtype == BF16 else 2.0**-24
    return exact.abs() * (half_unit + 4e-6) + 4e-6


def held(found: Tensor, exact: Tensor) -> None:
    assert ((found.double() - exact).abs() <= bound(exact, found.dtype)).all()


def held_in_codes(codes: Tensor, scale: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The codes are the nearest, to numbers rounded to `dtype` before: three digits, or 2^-9 of the smallest scale."""
    rows = exact.abs().amax(-1, keepdim=True)
    assert ((scale.double() - rows / 448).abs() <= bound(rows / 448, dtype)).all()
    apart = (codes.double() * scale.double() - exact).abs()
    assert (apart <= exact.abs() * 2**-4 + scale.double() * 2**-10 + 2 * bound(exact, dtype)).all()
    # e4m3 numbers lie 2^-3 apart on average: errors of nearest ones are far smaller than those of cut-off ones.
    assert apart.norm() / exact.norm() < 0.035


class Tokens:
    """Tokens out of a wider buffer, tables out of the six rows of a block, rows that are used unevenly."""

    def __init__(self, width: int, dtype: torch.dtype, by_row: bool, batch: int = 2) -> None:
        self.buffer = torch.randn(batch, 9, width + 7).to(dtype)
        self.x, self.y = self.buffer[:, 1:6, 3 : width + 3], torch.randn(batch, 5, 2 * width)[..., :width].to(BF16)
        tables = torch.randn(batch, 3 if by_row else 1, 6, width)
        self.bias, self.weight, self.gate = tables.unbind(2)[1:4]
        self.rows = torch.tensor([0, 2, 2, 1, 0]) if by_row else None
        index = torch.zeros(5, dtype=torch.long) if self.rows is None else self.rows
        bias, weight, gate = (table.double()[:, index] for table in (self.bias, self.weight, self.gate))
        self.added = self.y.double() * gate
        self.summed = self.x.double() + self.added
        self.modulated = lambda x: torch.nn.functional.layer_norm(x, (width,), eps=1e-6) * weight + bias
        self.around = self.buffer.clone()

    def nothing_else_was_written(self) -> bool:
        self.around[:, 1:6, 3 : 3 + self.x.shape[-1]] = self.x
        return torch.equal(self.around, self.buffer)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(("width", "by_row"), [(41, True), (96, False)])
def test_residual_gate_norm_and_modulation(
    interpreted: SimpleNamespace, width: int, by_row: bool, dtype: torch.dtype
) -> None:
    t, kernels = Tokens(width, dtype, by_row), interpreted.modulate
    for wanted in (torch.float32, BF16):
        alone = kernels.layer_norm(t.x, (t.weight, t.bias, t.rows, 1e-6, wanted))
        assert alone.dtype == wanted
        held(alone, t.modulated(t.x.double()))
    x, normed = kernels.gated_add_norm(t.x, t.y, t.gate, (t.weight, t.bias, t.rows, 1e-6, BF16))
    assert x is t.x and t.nothing_else_was_written()
    held(x, t.summed)
    held(normed, t.modulated(x.double()))
    before = x.double()
    assert kernels.gated_add(t.x, t.y, t.gate, t.rows) is t.x
    held(t.x, before + t.added)


def test_a_sum_without_a_gate_and_tables_of_one_row_for_all(interpreted: SimpleNamespace) -> None:
    t = Tokens(24, torch.float32, by_row=False)
    weight, bias = t.weight[:1], t.bias[:1]
    exact = t.x.double() + t.y.double()
    x, normed = interpreted.modulate.gated_add_norm(
        t.x, t.y, None, (weight, bias, torch.zeros(5, dtype=torch.long), 1e-6, torch.float32)
    )
    held(x, exact)
    layer_norm = torch.nn.functional.layer_norm(exact, (24,), eps=1e-6)
    held(normed, layer_norm * weight.double() + bias.double())


@pytest.mark.parametrize(("width", "by_row"), [(41, True), (96, False)])
def test_norm_and_modulation_in_8_bits(interpreted: SimpleNamespace, width: int, by_row: bool) -> None:
    t = Tokens(width, torch.float32, by_row)
    norm = t.weight, t.bias, t.rows, 1e-6, BF16
    codes, scale = interpreted.modulate.layer_norm_quantize(t.x, norm)
    assert codes.shape == t.x.shape and scale.shape == (2, 5, 1) and t.nothing_else_was_written()
    held_in_codes(codes, scale, t.modulated(t.x.double()), BF16)
    x, codes, scale = interpreted.modulate.gated_add_norm_quantize(t.x, t.y, t.gate, norm)
    held(x, t.summed)
    held_in_codes(codes, scale, t.modulated(t.summed), BF16)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 2, 45), BF16), ((4, 64), torch.float32)])
def test_rows_and_their_gelu_in_8_bits(
    interpreted: SimpleNamespace, shape: tuple[int, ...], dtype: torch.dtype, gelu: bool
) -> None:
    x = torch.randn(*shape[:-1], 3 * shape[-1]).to(dtype)[..., shape[-1] : -shape[-1]]
    x *= torch.logspace(-4, 2, len(x)).view(-1, *[1] * (x.ndim - 1))
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    codes, scale = getattr(interpreted.quantize, "quantize_gelu" if gelu else "quantize_rows")(x)
    assert codes.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
    held_in_codes(codes, scale, exact, dtype)
    if not gelu:
        assert torch.equal(codes.float().abs().amax(-1), torch.full(x.shape[:-1], 448.0))
        nothing, _ = interpreted.quantize.quantize_rows(torch.zeros(1, 5))
        assert nothing.float().tolist() == [[0.0] * 5]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(("heads", "head"), [(3, 10), (2, 64)])
@pytest.mark.parametrize(("normed", "turned"), [(True, True), (True, False), (False, True)])
def test_norm_and_rotary_embedding_in_place(
    interpreted: SimpleNamespace, heads: int, head: int, normed: bool, turned: bool, dtype: torch.dtype
) -> None:
    """Queries between keys and values of one buffer, which stay as they are."""
    width = heads * head
    buffer = torch.randn(2, 5, 3 * width).to(dtype)
    before, x = buffer.clone(), buffer[..., width : 2 * width]
    weight, angles = torch.randn(width), torch.randn(5, 1, head // 2)
    exact = x.double()
    if normed:
        exact = torch.nn.functional.rms_norm(exact, (width,), weight.double(), 1e-6)
    exact = exact.unflatten(-1, (heads, head))
    if turned:
        pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)).contiguous())
        exact = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles).double(), angles.double())).flatten(-2)
    rope = torch.stack((angles.cos(), angles.sin()), -1)
    out = interpreted.rope.norm_rotate(x, weight if normed else None, rope if turned else None, heads, 1e-6)
    assert out.data_ptr() == x.data_ptr() and out.shape == (2, 5, heads, head)
    held(out, exact)
    for other in (slice(0, width), slice(2 * width, None)):
        assert torch.equal(buffer[..., other], before[..., other])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("heads", [3, 2])
def test_norm_and_rotary_embedding_in_codes_beside_what_is_read(
    interpreted: SimpleNamespace, heads: int, dtype: torch.dtype
) -> None:
    """Scales follow from the weights, so the largest code is no 448; no value is cut off, and what is read stays."""
    width = heads * 16
    buffer, weight, angles = torch.randn(2, 5, 3 * width).to(dtype), torch.randn(width), torch.randn(5, 1, 8)
    buffer[1, 2, width:], buffer[1, 2, width + 3] = 0.0, 100.0  # as large as a value of a normed row can be
    before, x = buffer.clone(), buffer[..., width : 2 * width]
    rope = torch.stack((angles.cos(), angles.sin()), -1)
    codes, scale = interpreted.rope.norm_rotate_quantize(x, weight, rope, heads, 1e-6)
    assert torch.equal(buffer, before)
    assert codes.shape == (2, 5, heads, 16) and scale.shape == (2, heads)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6).unflatten(-1, (heads, 16))
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)).contiguous())
    exact = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles).double(), angles.double())).flatten(-2)
    largest = weight.view(heads, 16).abs().amax(-1) * width**0.5 / 448
    torch.testing.assert_close(scale, largest.expand(2, -1))
    whole = scale.double()[:, None, :, None]
    apart = (codes.double() * whole - exact).abs()
    assert (apart <= exact.abs() * 2**-4 + whole * 2**-10 + 2 * bound(exact, dtype)).all()
    assert apart.norm() / exact.norm() < 0.035
    assert torch.isfinite(codes.float()).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("channels", [12, 33])
def test_norm_and_silu_into_a_buffer_of_more_frames_and_bias_with_residual(
    interpreted: SimpleNamespace, channels: int, dtype: torch.dtype
) -> None:
    layout = {"memory_format": torch.channels_last_3d}
    x = (torch.randn(2, channels, 2, 3, 5) * 30).to(dtype).contiguous(**layout)
    buffer = torch.full((2, channels, 4, 5, 7), 7.0, dtype=dtype).contiguous(**layout)
    gamma, bias = torch.randn(channels, 1, 1, 1), torch.randn(channels).to(dtype)
    out = buffer[:, :, 2:, 1:-1, 1:-1]
    exact = x.double() / x.double().square().mean(1, keepdim=True).sqrt() * gamma.double()
    exact = torch.nn.functional.silu(exact)
    assert interpreted.video.norm_silu(x, gamma, out) is out
    held(out, exact)
    around = torch.full_like(buffer, 7.0)
    around[:, :, 2:, 1:-1, 1:-1] = out
    assert torch.equal(buffer, around)
    held(interpreted.video.norm_silu(x, gamma), exact)
    exact = x.double() + bias.double().view(-1, 1, 1, 1) + out.double()
    assert interpreted.video.add_bias(x, bias, out) is x
    held(x, exact)


def test_what_a_kernel_is_not_written_for_it_leaves_alone(interpreted: SimpleNamespace) -> None:
    k, wide = interpreted, torch.zeros(1, 1, 20000)
    strided = torch.zeros(1, 8, 6).mT
    table = torch.zeros(1, 1, 8)
    frames = torch.zeros(1, 4, 2, 2, 2)
    for made in (
        k.modulate.layer_norm(strided, (table, table, None, 1e-6, BF16)),
        k.modulate.gated_add(wide, wide, wide),
        k.modulate.layer_norm(table.long(), (table, table, None, 1e-6, BF16)),
        k.quantize.quantize_rows(wide),
        k.rope.norm_rotate(strided, None, None, 2, 1e-6),
        k.rope.norm_rotate(torch.zeros(1, 2, 8), None, torch.zeros(2, 1, 2, 4).mT, 1, 1e-6),
        k.rope.norm_rotate_quantize(torch.zeros(1, 2, 24), table, None, 2, 1e-6),
        k.video.norm_silu(frames, torch.ones(4)),
    ):
        assert made is NotImplemented


def test_all_kernels_pass_the_trial_that_decides_about_their_use(interpreted: SimpleNamespace) -> None:
    """GELU in cuBLASLt's product is the one that needs a card even to be tried."""
    table: dict[Op, object] = dict(PROVIDERS["triton"].load())
    outcome = {op.name: tried(op, kernel, torch.device("cpu")) for op, kernel in table.items()}  # type: ignore[arg-type]
    assert {name for name, (served, _) in outcome.items() if not served} == {"linear_gelu"}
    assert all(distance <= op.tolerance for op in table for distance in [outcome[op.name][1]])
