"""Charts as SVG text: a roofline and stacked bars. Colours are told apart in print too, by order and by label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 420
LEFT, TOP, RIGHT, BOTTOM = 70, 30, 30, 50
COLOURS = ("#1b4f72", "#2e86c1", "#85c1e9", "#f39c12", "#b9770e")


def roofline(bandwidth: float, roofs: Mapping[str, float], points: Mapping[str, float]) -> str:
    """FLOP a second over FLOP a byte, both logarithmic. Points stand where the first roof lets them."""
    (_, top), *_ = roofs.items()
    low, high = 0.1, 1e5

    def x(intensity: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(intensity / low) / math.log(high / low)

    floor, ceiling = low * bandwidth, 2 * max(roofs.values())

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(rate / floor) / math.log(ceiling / floor)

    parts = [_text(WIDTH / 2, HEIGHT - 12, "FLOP per byte of device memory", "middle")]
    for power in range(-1, 6):
        parts += [_line(x(10.0**power), TOP, x(10.0**power), HEIGHT - BOTTOM, "#ddd")]
        parts += [_text(x(10.0**power), HEIGHT - BOTTOM + 16, f"{10.0**power:g}", "middle")]
    for rate in (1e12, 1e13, 1e14, 1e15):
        parts += [_line(LEFT, y(rate), WIDTH - RIGHT, y(rate), "#ddd")]
        parts += [_text(LEFT - 6, y(rate) + 4, f"{rate / 1e12:g}", "end")]
    parts.append(_text(8, TOP - 10, "TFLOP/s", "start"))
    for index, (name, rate) in enumerate(roofs.items()):
        ridge = rate / bandwidth
        parts += [_line(x(low), y(low * bandwidth), x(ridge), y(rate), COLOURS[index], 2)]
        parts += [_line(x(ridge), y(rate), x(high), y(rate), COLOURS[index], 2)]
        parts += [_text(WIDTH - RIGHT, y(rate) - 6, f"{name}: {rate / 1e12:.0f}", "end")]
    for index, (name, intensity) in enumerate(sorted(points.items(), key=lambda point: point[1])):
        at = min(top, intensity * bandwidth)
        below = 18 + 14 * (index % 4)
        parts += [f'<circle cx="{x(intensity):.1f}" cy="{y(at):.1f}" r="4" fill="{COLOURS[3]}"/>']
        on_right = x(intensity) > 0.6 * WIDTH
        place = x(intensity) + (-6 if on_right else 6)
        parts += [_text(place, y(at) + below, f"{name} ({intensity:,.0f})", "end" if on_right else "start")]
    return _svg(HEIGHT, parts)


def bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Stacked horizontal bars, each as long as its share of its own sum; the sum stands behind it."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    height, left = 40 + 30 * len(rows) + 30, 210
    wide = WIDTH - left - 90
    parts: list[str] = []
    for index, kind in enumerate(kinds):
        parts.append(f'<rect x="{left + 130 * index}" y="8" width="12" height="12" fill="{COLOURS[index]}"/>')
        parts.append(_text(left + 130 * index + 17, 18, kind, "start"))
    for place, (name, row) in enumerate(rows.items()):
        y, start, total = 36 + 30 * place, float(left), sum(row.values())
        parts.append(_text(left - 8, y + 15, name, "end"))
        for index, kind in enumerate(kinds):
            length = wide * row.get(kind, 0.0) / total
            parts.append(
                f'<rect x="{start:.1f}" y="{y}" width="{length:.1f}" height="20" fill="{COLOURS[index]}"/>'
            )  # fmt: skip
            start += length
        parts.append(_text(left + wide + 8, y + 15, f"{total:.3g} {unit}", "start"))
    return _svg(height, parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
    ground = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([f'{head} font-size="12">', ground, *parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, wide: int = 1) -> str:
    where = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {where} stroke="{colour}" stroke-width="{wide}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
