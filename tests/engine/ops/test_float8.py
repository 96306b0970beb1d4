"""8-bit weights against numbers worked out from the format's definition, and layers against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.float8 import (
    Coded,
    Float8Linear,
    card_product,
    quantize_rows,
    quantize_weight,
    scaled_product,
)
from wan.engine.ops.linear import project

NORMAL = [2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8)]
CODES = np.array([m / 8 * 2.0**-6 for m in range(8)] + NORMAL[:-1])
"""Every number of the format from its definition: exponents -6 to 8, three digits, and the last one is not a number."""


def nearest(x: np.ndarray) -> np.ndarray:
    """The nearest number of the format; of two equally near ones that with an even code, which comes first here."""
    numbers = np.concatenate([CODES[::2], CODES[1::2]])
    return np.sign(x) * numbers[np.abs(np.abs(x)[..., None] - numbers).argmin(-1)]


def test_rows_become_the_nearest_numbers_of_the_format() -> None:
    x = torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]
    codes, scale = quantize_rows(x)
    rows = x.double().numpy()
    expected = np.abs(rows).max(-1, keepdims=True) / 448
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-7)
    divided = (x / scale).double().numpy()
    np.testing.assert_array_equal(codes.double().numpy(), nearest(divided))
    assert codes.float().abs().amax(-1).tolist() == [448.0] * 7


def test_rows_of_zeros_and_the_smallest_and_largest_numbers_survive() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-42, 0.0], [3e38, -3e38]])
    codes, scale = quantize_rows(x)
    numbers = codes.double() * scale.double()
    assert numbers[0].tolist() == [0, 0]
    assert 0 <= numbers[1, 0] <= 1e-42
    torch.testing.assert_close(numbers[2], x[2].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (70, 33)])
def test_weights_are_quantised_in_pieces_as_they_would_be_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape).bfloat16()
    monkeypatch.setattr("wan.engine.ops.float8.PIECE", 100)
    codes, scale = quantize_weight(weight)
    whole, whole_scale = quantize_rows(weight)
    assert torch.equal(codes.float(), whole.float()) and torch.equal(scale, whole_scale)


# Coded weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_coded_weight_reads_as_its_numbers_and_is_held_without_loss(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    codes, scale = (torch.randn(6, 40) * 30).to(dtype), torch.rand(shape) + 0.1
    weight = Coded(codes, scale)
    numbers = codes.double() * scale.double()
    assert weight.shape == (6, 40) and weight.dtype == torch.float32
    torch.testing.assert_close(weight + 0, numbers.float())
    torch.testing.assert_close(weight.to(torch.bfloat16), numbers.float().bfloat16())
    assert type(torch.cat([weight, weight])) is Tensor and type(weight.view(3, 80)) is Tensor
    held, rows = quantize_weight(weight)
    assert rows.shape == (6, 1) and held.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(
        held.double() * rows.double(), numbers, rtol=1e-6, atol=float(numbers.abs().max()) * 2e-6
    )
    if dtype == torch.float8_e4m3fn:
        assert held is codes


# Layers --------------------------------------------------------------------------------------------------------------


def layer_of(in_features: int, out_features: int, *, scaled: bool, bias: bool = True) -> tuple[Float8Linear, nn.Linear]:
    plain = nn.Linear(in_features, out_features, bias=bias).bfloat16()
    made = Float8Linear(plain, scaled=scaled)
    made.weight.data, made.weight_scale.data = quantize_weight(plain.weight.data)
    return made, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_multiplies_by_its_weight_rounded_once_to_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer, _ = layer_of(13, 7, scaled=True, bias=False)  # of odd sizes: computed as weight-only
    assert not layer.scaled
    x = torch.randn(2, 5, 13).to(dtype)
    weight = (layer.weight.double() * layer.weight_scale.double()).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, F.linear(x, weight))


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_layer_is_the_float64_product_of_quantised_rows(bias: bool) -> None:
    """To bfloat16's rounding: products of e4m3 are exact and sums of 48 of them lose nothing that could be seen."""
    layer, plain = layer_of(48, 32, scaled=True, bias=bias)
    x = (torch.randn(2, 9, 48) * torch.logspace(-3, 3, 9)[:, None]).bfloat16()
    rows = x.double().numpy()
    step = np.float32(np.abs(rows).max(-1, keepdims=True)) / np.float32(448)
    codes = nearest(np.float64(np.float32(rows) / step))
    weight = layer.weight.double().numpy() * layer.weight_scale.double().numpy()
    expected = codes * np.float64(step) @ weight.T
    if plain.bias is not None:
        expected += plain.bias.detach().double().numpy()
    out = layer(x)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 9, 32)
    np.testing.assert_allclose(out.detach().double().numpy(), expected, rtol=2**-8, atol=1e-6 * np.abs(expected).max())
    error = (out - plain(x)).float().norm() / plain(x).float().norm()
    assert 0.005 < error < 0.06


@pytest.mark.parametrize("bias", [True, False])
def test_the_call_for_the_card_is_the_definition(bias: bool) -> None:
    """Layouts and scales as PyTorch wants them, on its CPU kernel; one bfloat16 rounding apart at most."""
    (codes, scale), (weight, rows) = (quantize_rows(torch.randn(n, 96) * torch.rand(n, 1)) for n in (64, 48))
    added = torch.randn(48).bfloat16() if bias else None
    try:
        found = card_product(codes, scale, weight, rows, added)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no such product on the CPU: {error}")
    expected = scaled_product(codes, scale, weight, rows, added)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_layers_that_share_an_input_quantise_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer_of(16, 16, scaled=True)[0] for _ in range(3)]
    x = torch.randn(1, 4, 16).bfloat16()
    alone = [layer(x) for layer in layers]
    calls: list[Tensor] = []

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x)
        return quantize_rows(x)

    monkeypatch.setattr("wan.engine.ops.linear.quantize_rows", counted)
    together = project(x, *layers)
    assert len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_layers_compile_without_a_break(scaled: bool) -> None:
    layer, _ = layer_of(32, 16, scaled=scaled)
    x = torch.randn(3, 4, 32).bfloat16()
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 64, 32), (77, 256, 128), (4096, 1536, 8960)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_products_of_the_card_are_those_of_the_cpu(sizes: tuple[int, int, int], bias: bool) -> None:
    """Fast accumulation keeps fewer digits of a sum than float32; bfloat16's result has 8 bits."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no 8-bit products before sm_89")
    rows, in_features, out_features = sizes
    layer, _ = layer_of(in_features, out_features, scaled=True, bias=bias)
    x = torch.randn(rows, in_features).bfloat16()
    with torch.inference_mode():
        expected = layer(x).float()
        found = layer.cuda()(x.cuda()).float().cpu()
    assert (found - expected).norm() / expected.norm() < 5e-3
