"""The report as one HTML file that needs nothing else: tables, bars as SVG, frames as PNG inside the text."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from wan.cli.benchmarking.rows import Row
from wan.cli.benchmarking.told import COLUMNS, cell, ratios, stage_lines

TOLD = ("command", "commit", "torch", "date")
STAGES = {
    "text_s": ("text and inputs", "#8a6fb0"),
    "denoise_s": ("denoise", "#3f7fbf"),
    "decode_s": ("decode", "#e0a030"),
}
MORE = {
    "host_gib": "RAM GiB", "reserved_gib": "reserved GiB", "nvml_gib": "card GiB", "power_w": "W", "clock_mhz": "MHz",
    "temperature_c": "°C", "forward_tflop": "TFLOP/forward", "ceiling_tflops": "ceiling TFLOP/s",
    "copy_gb_s": "copy GB/s",
    "frames_max": "frames differ, most", "frames_mean": "on average", "lpips": "LPIPS", "reads_as": "judge reads",
}  # fmt: skip
SECONDS = {
    "components": "seconds by network",
    "steps_s": "seconds of a step, after the first",
    "parts": "seconds of one forward by part (a run that is not timed)",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left }
.failed { color: #b02020; text-align: left }
figure { display: inline-block; margin: .5rem 1rem .5rem 0 } figure img { display: block; max-width: 100% }
figcaption, .small { color: #666; font-size: 13px } code { overflow-wrap: anywhere }
"""


def page(head: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> str:
    """The document; pictures are read from `folder`, below which the rows name them."""
    title = f"Benchmark of {', '.join(dict.fromkeys(row['task'] for row in rows)) or 'nothing yet'}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p class=small>{name}: <code>{escape(str(head.get(name)))}</code></p>" for name in TOLD),
    ]
    if len({row["key"] for row in rows}) > 1:
        parts.append(_bars([row for row in rows if row["status"] == "ok"]))
    for _, group in groupby(rows, key=lambda row: row["key"]):
        parts += _cell(list(group), folder)
    return "\n".join([*parts, "</body></html>\n"])


def _cell(rows: Sequence[Row], folder: Path) -> list[str]:
    first, done = rows[0], [row for row in rows if row["status"] == "ok"]
    what = f"{first['task']}, {first['size']}, {first['frames']} frames, {first['steps']} steps of {first['solver']}"
    repeated = f"median of {first['runs']} runs after {first['warmup']}; " + (
        "in turns" if first["interleaved"] else "one variant after the other"
    )
    parts = [f"<h2>{escape(what)}</h2>", f"<p class=small>{repeated}; noise: {escape(first['noise'])}</p>"]
    parts += [_table(rows, COLUMNS), _bars(done), *(f"<p>{escape(line)}</p>" for line in ratios(done))]
    parts += [_table(done, {"variant": "variant", **MORE}), *(_seconds(done, kind) for kind in SECONDS)]
    for row in done:
        plan = f"{row['variant']}: {row['plan']}; {row['versions']}; {row['hardware']}"
        parts.append(f"<p class=small>{escape(plan)}</p>")
        parts += [f"<p class=small>{escape(line)}</p>" for line in stage_lines(row)]
        for why, names in _reasons(row["not_measured"]).items():
            parts.append(f"<p class=small>{escape(row['variant'])}: {', '.join(names)} not measured: {escape(why)}</p>")
    return [*parts, *(_picture(row, folder) for row in done if row["picture"])]


def _table(rows: Iterable[Row], columns: Mapping[str, str]) -> str:
    """Columns without any figure are left out."""
    rows = list(rows)
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = ["<table><tr>", *(f"<th>{escape(columns[name])}</th>" for name in names), "</tr>"]
    for row in rows:
        if row["status"] == "ok":
            cells = "".join(f"<td>{escape(cell(name, row.get(name)))}</td>" for name in names)
        else:
            cells = (
                f"<td>{escape(row['variant'])}</td>"
                f"<td class=failed colspan={max(len(names) - 1, 1)}>failed: {escape(row['reason'])}</td>"
            )
        lines.append(f"<tr>{cells}</tr>")
    return "".join([*lines, "</table>"])


def _seconds(rows: Sequence[Row], kind: str) -> str:
    """Seconds by network or by part of a forward, one row a variant."""
    names = list(dict.fromkeys(name for row in rows for name in row[kind]))
    if not names:
        return ""
    lines = [f"<table><tr><th>{SECONDS[kind]}</th>", *(f"<th>{escape(name)}</th>" for name in names), "</tr>"]
    for row in rows:
        values = "".join(f"<td>{cell(name, row[kind].get(name))}</td>" for name in names)
        lines.append(f"<tr><td>{escape(row['variant'])}</td>{values}</tr>")
    return "".join([*lines, "</table>"])


def _bars(rows: Sequence[Row]) -> str:
    """Seconds by stage, a bar a variant, on one scale."""
    if not rows:
        return ""
    longest, left, width, height = max(row["total_s"] for row in rows), 300, 600, 24
    shapes = []
    for place, row in enumerate(rows):
        y, x = place * height, float(left)
        title = " ".join(filter(None, (row["cell"], row["variant"])))
        shapes.append(f'<text x="0" y="{y + 16}">{escape(title)}</text>')
        for name, (label, colour) in STAGES.items():
            length = row[name] / longest * width
            tip = f"<title>{label}: {row[name]:.3g} s</title>"
            shapes.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="17" fill="{colour}">{tip}</rect>'
            )
            x += length
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{row["total_s"]:.3g} s</text>')
    at = left
    for label, colour in STAGES.values():
        y = len(rows) * height
        shapes.append(f'<rect x="{at}" y="{y + 8}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{at + 17}" y="{y + 19}">{label}</text>')
        at += 150
    size = f'width="{left + width + 90}" height="{(len(rows) + 1) * height + 6}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="13">{"".join(shapes)}</svg>'


def _picture(row: Row, folder: Path) -> str:
    data = base64.b64encode((folder / row["picture"]).read_bytes()).decode()
    name = escape(row["variant"])
    return (
        f'<figure><img alt="first, middle and last frame of {name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{name}: first, middle, last frame</figcaption></figure>"
    )


def _reasons(missing: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in missing.items():
        reasons.setdefault(why, []).append(name)
    return reasons
