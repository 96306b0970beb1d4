"""Rows of the quality mode: what a case gains and what it costs, each against the plain clips of the same noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wan.cli.benchmarking.cases import PLAIN, Case
from wan.cli.benchmarking.intervals import of_mean, wilson
from wan.cli.benchmarking.samples import CONTINUOUS, Sample, Samples

Row = dict[str, Any]
CHANGES = ("change_usual", "change_joint", "change_most")
TOGETHER = "everything"
SPEEDS = {"speed": "seconds", "denoise_speed": "denoise_s", "cpu_speed": "cpu_s"}
"""How many times as fast, and by what: on a CPU that others use too, seconds of the process itself mean more."""


def rows_of(cases: Sequence[Case], samples: Samples, common: Mapping[str, Any]) -> list[Row]:
    """One for each case, the plain run first."""
    plain = samples.of(PLAIN)
    return [_row(case, samples, plain, common) for case in cases]


def _row(case: Case, samples: Samples, plain: Mapping[int, Sample], common: Mapping[str, Any]) -> Row:
    row: Row = {"variant": case.label, "grade": case.grade, "quality": case.quality, "kinds": list(case.kinds)}
    row |= {"values": dict(case.values), **common, "status": "ok", "reason": ""}
    mine = samples.of(case.label)
    if case.label in samples.failures:
        row |= {"status": "failed", "reason": samples.failures[case.label]}
    row["runs"] = len(mine)
    if not mine:
        return row
    seconds = [sample["seconds"] for sample in mine.values()]
    row |= {"total_s": statistics.median(seconds), "total_min_s": min(seconds), "total_max_s": max(seconds)}
    row |= {"peak_gib": max(sample["peak_gib"] for sample in mine.values())}
    row["forwards"] = statistics.fmean(sample["forwards"] for sample in mine.values())
    row["judge"] = _judge(list(mine.values()))
    row |= {name: _mean(mine.values(), name) for name in (*CONTINUOUS, *CHANGES) if _mean(mine.values(), name)}
    if case.label != PLAIN:
        row |= _against(mine, plain)
    return row


def _against(mine: Mapping[int, Sample], plain: Mapping[int, Sample]) -> Row:
    """Everything that is told in pairs."""
    pairs = [(mine[number], plain[number]) for number in mine.keys() & plain.keys()]
    if not pairs:
        return {}
    found: Row = {"pairs": len(pairs)}
    for name, key in SPEEDS.items():
        ratio = of_mean([math.log(b[key] / a[key]) for a, b in pairs])
        found[name] = [round(math.exp(value), 4) for value in ratio]
    ours = [a for a, _ in pairs]
    found["equal"] = sum(sample.get("frames_max") == 0 for sample in ours)
    for name in ("psnr_db", "ssim", "lpips", "latents_differ"):
        if (mean := _mean(ours, name)) is not None:
            found[name] = mean
    if "psnr_db" in found:
        found["psnr_worst_db"] = min(sample["psnr_db"] for sample in ours if "psnr_db" in sample)
    found["differences"] = {
        name: [round(value, 5) for value in of_mean(apart)]
        for name in (*CONTINUOUS, *CHANGES)
        if (apart := [a[name] - b[name] for a, b in pairs if name in a and name in b])
    }
    both = [(all(a["right"].values()), all(b["right"].values())) for a, b in pairs if "right" in a and "right" in b]
    if both:
        found |= {"lost": both.count((False, True)), "gained": both.count((True, False))}
    return found


def _judge(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Attribute -> how often it was right, with the interval."""
    rights = [sample["right"] for sample in samples if "right" in sample]
    found = {name: [right[name] for right in rights if name in right] for right in rights for name in right}
    return {
        name: _share(hits) for name, hits in (found | {TOGETHER: [all(r.values()) for r in rights]}).items() if hits
    }


def _share(hits: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(hits), len(hits))
    return {"right": sum(hits), "of": len(hits), "low": round(low, 4), "high": round(high, 4)}


def _mean(samples: Any, name: str) -> float | None:
    values = [sample[name] for sample in samples if name in sample]
    return float(f"{statistics.fmean(values):.5g}") if values else None


# What is shown -------------------------------------------------------------------------------------------------------

Shown = Callable[[Row], str]
COLUMNS: dict[str, Shown] = {
    "": lambda row: f"`{row['variant']}`" if row["variant"] != PLAIN else PLAIN,
    "speed": lambda row: _range(row["speed"], "x") if "speed" in row else "",
    "by CPU time": lambda row: _range(row["cpu_speed"], "x") if "cpu_speed" in row and row["on_cpu"] else "",
    "forwards": lambda row: f"{row['forwards']:.4g}",
    "latents": lambda row: f"{row['latents_differ']:.1e}" if "latents_differ" in row else "",
    "PSNR dB, mean / worst": lambda row: _psnr(row),
    "SSIM": lambda row: f"{row['ssim']:.4f}" if "ssim" in row else "",
    "LPIPS": lambda row: f"{row['lpips']:.4f}" if "lpips" in row else "",
    "shape IoU": lambda row: _apart(row, "shape_iou"),
    "colour distance": lambda row: _apart(row, "color_distance"),
    "outline IoU": lambda row: _apart(row, "outline_iou"),
    "all attributes right": lambda row: _everything(row),
    "usual change": lambda row: _apart(row, "change_usual"),
    "at joints": lambda row: _apart(row, "change_joint"),
    "at most": lambda row: _apart(row, "change_most"),
}
"""Heading -> a row's cell; columns that all rows leave empty are not shown."""


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table; a row that failed says why, one that is not complete how many clips it has."""
    cells = [_cells(row) for row in rows]
    used = [place for place in range(len(COLUMNS)) if any(line[place] for line in cells)]
    heads = list(COLUMNS)
    lines = [
        [heads[place] for place in used],
        ["---"] * len(used),
        *([line[place] for place in used] for line in cells),
    ]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _cells(row: Row) -> list[str]:
    if not row["runs"]:
        return [COLUMNS[""](row), f"not run: {row['reason']}", *[""] * (len(COLUMNS) - 2)]
    cells = [shown(row) for shown in COLUMNS.values()]
    if row["status"] == "failed":
        cells[1] = f"failed after {row['runs']} clips: {row['reason']}"
    return cells


def _range(values: Sequence[float], unit: str) -> str:
    mean, low, high = values
    return f"{mean:.2f}{unit} ({low:.2f} - {high:.2f})"


def _psnr(row: Row) -> str:
    if row.get("equal") and row["equal"] == row.get("pairs"):
        return "equal"
    return f"{row['psnr_db']:.1f} / {row['psnr_worst_db']:.1f}" if "psnr_db" in row else ""


def _apart(row: Row, name: str) -> str:
    """The plain run's mean; of another row its difference with the interval."""
    if name in row.get("differences", {}):
        mean, low, high = row["differences"][name]
        return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"{row[name]:.3f}" if name in row else ""


def _everything(row: Row) -> str:
    share = row.get("judge", {}).get(TOGETHER)
    if share is None:
        return ""
    text = f"{share['right']}/{share['of']} [{share['low']:.0%}, {share['high']:.0%}]"
    return text + (f"; {row['lost']} lost, {row['gained']} gained" if row.get("lost") or row.get("gained") else "")
