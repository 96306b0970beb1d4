"""What arithmetic says a card of the H100's kind should do, written down before any was measured, beside what it did.

A prediction is a range, in the unit named, of the row (or the ratio of two rows) named; rows are those of an H100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Quantity = Literal["tflops", "gb_s", "median_s", "distance"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`row` (over `of`, where that is named) should lie between `low` and `high`."""

    what: str
    row: str
    quantity: Quantity
    low: float
    high: float
    of: str = ""

    def measured(self, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The value in these rows by key; None where it was not measured."""
        values = [_value(rows.get(key), self.quantity) for key in filter(None, (self.row, self.of))]
        if any(value is None for value in values):
            return None
        return values[0] if not self.of else values[0] / values[1]  # type: ignore[operator]

    def told(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        value = self.measured(rows)
        within = None if value is None else self.low <= value <= self.high
        return {**vars(self), "measured": value, "within": within}


def _value(row: Mapping[str, Any] | None, quantity: Quantity) -> float | None:
    if row is None:
        return None
    return row["work"]["distance"] if quantity == "distance" else row[quantity]


PREDICTIONS: Sequence[Prediction] = (
    Prediction(
        what="cuDNN's attention in bf16, 75 600 tokens, 40 heads of 128, TFLOP/s", row="attention/cudnn/75600",
        quantity="tflops", low=570, high=630,
    ),
    Prediction(
        what="FlashAttention 3 in bf16, the same", row="attention/flash3/75600", quantity="tflops", low=650, high=700,
    ),
    Prediction(
        what="FlashAttention 3 in e4m3, the same (measured with quantising)", row="attention/flash3_fp8/75600",
        quantity="tflops", low=950, high=1050,
    ),
    *(
        Prediction(
            what=f"product 75 600 x 5120 x {wide}, {how}", row=f"gemm/{key}/{wide}", quantity="tflops", low=low,
            high=high,
        )
        for wide in (5120, 13824, 15360)
        for how, key, low, high in (
            ("bf16", "bf16", 700, 760), ("e4m3, one scale", "fp8 tensor", 1300, 1450),
            ("e4m3, a scale a row", "fp8 rows", 1100, 1300),
        )
    ),
    Prediction(
        what="norm and modulation, 75 600 tokens: GB/s", row="kernel/layer_norm/triton", quantity="gb_s", low=2600,
        high=3000,
    ),
    Prediction(
        what="gated residual, norm and modulation: GB/s", row="kernel/gated_add_norm/triton", quantity="gb_s", low=2600,
        high=3000,
    ),
    Prediction(
        what="gated residual, norm and modulation over float32: seconds", row="kernel/gated_add_norm/triton",
        quantity="median_s", low=1.5e-3, high=2.0e-3,
    ),
    Prediction(
        what="the same over bfloat16: seconds", row="kernel/gated_add_norm over bf16/triton", quantity="median_s",
        low=1.0e-3, high=1.4e-3,
    ),
    Prediction(
        what="GELU inside the product: relative distance to a GELU behind it", row="gemm/gelu inside/13824",
        quantity="distance", low=0.0, high=5e-3,
    ),
    Prediction(
        what="GELU behind the product over GELU inside it, 13 824 wide", row="gemm/gelu behind/13824",
        of="gemm/gelu inside/13824", quantity="median_s", low=1.08, high=1.14,
    ),
    *(
        Prediction(
            what=f"{kernel} convolution, FLOP of {channels} channels, bf16", row=f"{key}/bf16/{channels}",
            quantity="tflops", low=low, high=high,
        )
        for channels in (96, 192, 384, 256, 512, 1024)
        for kernel, key, low, high in (("3x3x3", "conv3d", 350, 450), ("3x3", "conv2d", 500, 600))
    ),
    Prediction(
        what="norm and rotation of queries, 75 600 tokens: seconds", row="kernel/norm_rotate/triton",
        quantity="median_s", low=0.5e-3, high=0.7e-3,
    ),
    Prediction(what="copies from pinned memory, GB/s", row="copy/pinned", quantity="gb_s", low=45, high=55),
    Prediction(
        what="the same while products are computed, GB/s", row="copy/pinned beside products", quantity="gb_s", low=45,
        high=55,
    ),
    Prediction(
        what="all blocks swapped, over all resident, A14B 720p", row="A14B 720p/ours swapped",
        of="A14B 720p/ours kernels", quantity="median_s", low=0.99, high=1.01,
    ),
    Prediction(
        what="the original's operations with FlashAttention 3, A14B 720p", row="A14B 720p/original flash3",
        quantity="median_s", low=12.5, high=13.8,
    ),
    Prediction(
        what="the original's operations with SDPA's own choice, A14B 720p", row="A14B 720p/original sdpa",
        quantity="median_s", low=17.0, high=20.0,
    ),
    Prediction(
        what="the original's operations with FlashAttention 3, 1.3B 480p", row="1.3B 480p/original flash3",
        quantity="median_s", low=0.62, high=0.70,
    ),
    Prediction(
        what="the original's operations with SDPA's own choice, 1.3B 480p", row="1.3B 480p/original sdpa",
        quantity="median_s", low=0.84, high=0.94,
    ),
    Prediction(
        what="our forward in bf16, A14B 720p", row="A14B 720p/ours kernels", quantity="median_s", low=9.3, high=10.6
    ),
    Prediction(
        what="our forward in bf16, A14B 480p", row="A14B 480p/ours kernels", quantity="median_s", low=2.4, high=2.75
    ),
    Prediction(
        what="our forward in bf16, 1.3B 480p", row="1.3B 480p/ours kernels", quantity="median_s", low=0.43, high=0.5
    ),
    Prediction(
        what="our forward in bf16, 5B 720p", row="5B 720p/ours kernels", quantity="median_s", low=0.76, high=0.86
    ),
    Prediction(
        what="our forward with products in 8 bits, A14B 720p", row="A14B 720p/ours fp8", quantity="median_s", low=8.6,
        high=9.6,
    ),
    Prediction(
        what="our forward with products and attention in 8 bits, A14B 720p", row="A14B 720p/ours 8-bit",
        quantity="median_s", low=6.3, high=7.3,
    ),
    Prediction(
        what="without a compiler over with it, A14B 720p", row="A14B 720p/ours kernels", of="A14B 720p/ours compiled",
        quantity="median_s", low=0.9, high=1.03,
    ),
    Prediction(
        what="a forward at t = 10 over one at t = 999", row="1.3B 480p/ours at t=10", of="1.3B 480p/ours kernels",
        quantity="median_s", low=0.99, high=1.01,
    ),
)  # fmt: skip
