"""What the terminal shows of rows: the table, who is faster, and where the original code's stages differ from ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wan.cli.benchmarking.rows import Row
from wan.engine.errors import GenerationFailed

LATENTS_AGREE = 1e-3
"""Relative distance of final latents up to which two variants did the same work (float32, twenty steps of guidance)."""

COLUMNS = {
    "variant": "variant", "total_s": "total s", "total_min_s": "min", "total_max_s": "max", "text_s": "text s",
    "denoise_s": "denoise s", "step_s": "s/step", "decode_s": "decode s", "mfu": "MFU", "peak_gib": "peak GiB",
    "dollars": "$", "latents_differ": "latents differ", "psnr_db": "PSNR dB", "ssim": "SSIM",
}  # fmt: skip
SCIENTIFIC, PERCENT = ("latents_differ",), ("mfu",)


def cell_lines(rows: Sequence[Row]) -> list[str]:
    """Everything about one cell."""
    first = rows[0]
    cell = f"{first['cell']}: " if first["cell"] else ""
    lines = [
        f"{cell}{first['task']}, {first['size']}, {first['frames']} frames, {first['steps']} steps of {first['solver']}"
    ]
    hardware = next((row["hardware"] for row in rows if "hardware" in row), "nothing ran")
    lines.append(f"{hardware}; commit {first['commit']}; median of {first['runs']} runs")
    lines += markdown(rows)
    lines += ratios([row for row in rows if row["status"] == "ok"])
    return lines + [line for row in rows for line in stage_lines(row)]


def stage_lines(row: Row) -> list[str]:
    """How far each stage of the original code is from ours."""
    return [
        f"{row['variant']}, {stage}: "
        + ("another shape than" if relative is None else f"{relative:.1e} relative, at most {largest:.2e} from")
        + f" {row['reference']}"
        for stage, relative, largest in row["stages_apart"]
    ]


def markdown(rows: Iterable[Row]) -> list[str]:
    """A Markdown table; a failed row says why. Columns without any figure are left out."""
    rows = list(rows)
    names = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[name] for name in names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        if row["status"] == "ok":
            cells = [cell(name, row[name]) for name in names]
        else:
            cells = [row["variant"], f"failed: {' '.join(row['reason'].split())}", *[""] * (len(names) - 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(name: str, value: object) -> str:
    """A figure as it is shown."""
    if value is None:
        return "-"
    if not isinstance(value, float | int):
        return str(value)
    if name in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.1e}" if name in SCIENTIFIC else f"{value:.3g}"


def ratios(rows: Sequence[Row]) -> list[str]:
    """Who is faster by how much, within each dtype, and best against best where two libraries ran."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        group = [row for row in rows if row["dtype"] == dtype]
        slowest = max(group, key=lambda row: row["total_s"])
        lines += [
            f"{r['variant']} is {slowest['total_s'] / r['total_s']:.2f}x as fast as {slowest['variant']}"
            for r in group
            if r is not slowest
        ]
    best = {
        library: min(row["total_s"] for row in rows if row["runner"].startswith(library))
        for library in ("wan", "diffusers")
        if any(row["runner"].startswith(library) for row in rows)
    }
    if len(best) == 2:
        lines.append(f"best dtype of each: {best['diffusers'] / best['wan']:.2f}x as fast as diffusers")
    return lines


def check_agreement(rows: Sequence[Row]) -> None:
    """Raise GenerationFailed if a float32 row that must do the same work as another one did not."""
    for row in rows:
        must = row["status"] == "ok" and row["runner"].startswith("diffusers") and row["dtype"] == "float32"
        if must and row["latents_differ"] is not None and row["latents_differ"] > LATENTS_AGREE:
            raise GenerationFailed(
                f"latents of {row['variant']} differ by {row['latents_differ']:.1e} from {row['reference']} "
                f"(allowed {LATENTS_AGREE:g}): the times above compare different work"
            )
