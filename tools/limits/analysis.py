"""docs/OPTIMIZATION_ANALYSIS.md and its charts: where time goes, what options buy, and what claims are worth.

Every number is computed here from sizes and data sheets, or read from a file of measurements; prose has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from guide_pages import sizes
from limits import charts
from limits.page import results

from wan.configs import WAN_CONFIGS
from wan.engine import roofline
from wan.engine.prediction import Video
from wan.engine.roofline import CARDS, Card, Forward

FLASH2_ON_HOPPER = 370e12
"""FLOP a second of PyTorch's own flash kernel, which is FlashAttention 2, on an H100; published by its authors."""
FP8_LINEAR, FP8_ATTENTION = 0.63, 0.48
"""Shares of the 8-bit rate of the data sheet taken as reachable, as roofline's are of the others."""
BUDGET_S = 90
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a forward is computed, as far as arithmetic tells."""

    fused: bool = False
    hopper_attention: bool = False
    linear_8: bool = False
    attention_8: bool = False


CASES = (
    ("1.3B 480p", "t2v-1.3B", 832, 480),
    ("5B 720p", "ti2v-5B", 1280, 704),
    ("A14B 480p", "t2v-A14B", 832, 480),
    ("A14B 720p", "t2v-A14B", 1280, 720),
)
LARGE = "A14B 720p"
H100 = next(card for card in CARDS if card.name == "H100")
SHOWN = [card for card in CARDS if card.name in ("H100", "A100 80GB", "L40S", "RTX 4090")]
PLAIN = Way()
EXACT = Way(fused=True, hopper_attention=True)
EIGHT = replace(EXACT, linear_8=True, attention_8=True)
STEPS_ON: Sequence[tuple[str, Way, str]] = (
    ("nothing: `--attention sdpa --kernels torch`", PLAIN, "ours"),
    ("`--attention auto`", Way(hopper_attention=True), ""),
    ("and `--kernels auto`, or `--compile`", EXACT, "ours kernels"),
    ("and `--fp8 scaled`", replace(EXACT, linear_8=True), "ours fp8"),
    ("and `--attention flash3_fp8`", EIGHT, "ours 8-bit"),
)


def video(case: tuple[str, str, int, int]) -> Video:
    _, task, width, height = case
    config = WAN_CONFIGS[task]
    return Video(width=width, height=height, frames=config.frame_num, steps=config.sample_steps)


def named(key: str) -> tuple[str, str, int, int]:
    return next(case for case in CASES if case[0] == key)


def cost(key: str, *, fused: bool) -> tuple[int, Forward]:
    """Tokens of a case and what its forward takes."""
    case = named(key)
    tokens = video(case).tokens(sizes(case[1]))
    return tokens, roofline.forward(sizes(case[1]).transformer, tokens, compiled=fused)


def parts(key: str, card: Card, way: Way) -> dict[str, float]:
    """Seconds of a forward by kind of work."""
    _, done = cost(key, fused=way.fused)
    attention = roofline.ATTENTION * card.bf16
    if card.bf16 == H100.bf16 and not way.hopper_attention:
        attention = FLASH2_ON_HOPPER
    if way.attention_8 and _is_hopper(card):
        attention = FP8_ATTENTION * card.fp8
    linear = FP8_LINEAR * card.fp8 if way.linear_8 and card.fp8 else roofline.GEMM * card.bf16
    return {
        "products": done.linear / linear,
        "self-attention": done.attention / attention,
        "attention to text": done.cross_attention / (roofline.CROSS_ATTENTION * card.bf16),
        "element-wise": done.moved_bytes / (roofline.HBM * card.hbm),
    }


def _is_hopper(card: Card) -> bool:
    return card.bf16 == H100.bf16


def forward_s(key: str, card: Card, way: Way) -> float:
    return sum(parts(key, card, way).values())


def intensities() -> dict[str, float]:
    """FLOP a byte of the parts of a block of 14B at 720p, each input read and each output written once."""
    tokens, _ = cost(LARGE, fused=True)
    net = sizes("t2v-A14B").transformer
    d, f = net.dim, net.ffn_dim
    text = net.text_len
    return {
        "self-attention": 4 * tokens**2 * d / (2 * 4 * tokens * d),
        "attention to text": 4 * tokens * text * d / (2 * 2 * (tokens + text) * d),
        "feed-forward product": 2 * tokens * d * f / (2 * (tokens * d + d * f + tokens * f)),
        "product d x d": 2 * tokens * d * d / (2 * (2 * tokens * d + d * d)),
        "norm and modulation": 8 / 6,
        "one token (a language model)": 2 * d * f / (2 * (d * f + d + f)),
    }


def rooflines() -> str:
    return charts.roofline(H100.hbm, {"bf16, H100": H100.bf16, "8 bits, H100": H100.fp8}, intensities())


def where() -> str:
    rows = {}
    for key, *_ in CASES:
        rows[f"{key}, plain"] = parts(key, H100, PLAIN)
        rows[f"{key}, fused, FA3"] = parts(key, H100, EXACT)
    return charts.bars(rows, "s")


def measured() -> dict[str, Mapping[str, Any]]:
    return {row["key"]: row for told in results() if not told["smoke"] for row in told["rows"]}


def shown(rows: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """A measured row's seconds, linked."""
    seconds = rows.get(key, {}).get("median_s")
    return NOT_MEASURED if seconds is None else f"[{seconds:.3g} s](benchmarks/limits.md)"


def cases_table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| one forward | tokens | TFLOP | products | self-attention | element-wise GB, plain / fused | plain | best exact | 8 bits | measured, best exact |"  # noqa: E501
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for key, *_ in CASES:
        tokens, plain = cost(key, fused=False)
        _, fused = cost(key, fused=True)
        seconds = " | ".join(f"{forward_s(key, H100, way):.2f} s" for way in (PLAIN, EXACT, EIGHT))
        moved = f"{plain.moved_bytes / 1e9:.0f} / {fused.moved_bytes / 1e9:.0f}"
        share = f"{plain.linear / plain.total:.0%} | {plain.attention / plain.total:.0%}"
        yield (
            f"| {key} | {tokens} | {plain.total / 1e12:.0f} | {share} | {moved} | {seconds} "
            f"| {shown(rows, f'{key}/ours kernels')} |"
        )


def flags_table(rows: Mapping[str, Mapping[str, Any]], key: str) -> Iterator[str]:
    yield f"| {key}, one forward | {' | '.join(card.name for card in SHOWN)} | measured on an H100 |"
    yield "|---" * (len(SHOWN) + 2) + "|"
    for said, way, row in STEPS_ON:
        cells = []
        for card in SHOWN:
            lacks = (way.linear_8 and not card.fp8) or (way.attention_8 and not _is_hopper(card))
            cells.append("-" if lacks else f"{forward_s(key, card, way):.2f} s")
        found = shown(rows, f"{key}/{row}") if row else NOT_MEASURED
        yield f"| {said} | {' | '.join(cells)} | {found} |"


def decode_s(dtype_bytes: int) -> float:
    """Seconds to decode 720p with VAE 2.1 in eager mode on an H100."""
    case = named(LARGE)
    vae = replace(sizes(case[1]).vae, element_size=dtype_bytes)
    frames, height, width = video(case).latent(vae)
    convs = list(roofline.decoder(vae, frames, height, width))
    return roofline.vae_seconds(vae, convs, frames, height * width, H100)


def speedup(key: str, way: Way, over: Way = EXACT) -> float:
    return forward_s(key, H100, over) / forward_s(key, H100, way)
