"""`--compare OLD.json`: is a row faster than it was, or is the difference what two runs differ by anyway?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wan.cli.benchmarking.rows import Row

SAME = ("task", "weights", "size", "frames", "steps", "solver", "guide_scale", "variant", "dtype")
"""What makes two rows the same work."""
LEAST_NOISE = 0.01
"""Two medians of the same thing differ by this much on a quiet machine; fewer runs cannot show less."""


def comparison(rows: Iterable[Row], old: Sequence[Row], name: str) -> list[str]:
    """A table of new against old: ratio, the band in which it is noise, verdict."""
    lines = [f"| against {name} | old s | new s | new / old | noise | verdict |", "|---|---|---|---|---|---|"]
    before = {_key(row): row for row in old if row.get("status", "ok") == "ok"}
    for row in rows:
        was = before.get(_key(row))
        title = " ".join(filter(None, (row["cell"], row["variant"])))
        if was is None or row["status"] != "ok":
            why = "is new" if was is None else "failed now"
            lines.append(f"| {title} | {_seconds(was)} | {_seconds(row)} | - | - | {why} |")
            continue
        ratio, noise = row["total_s"] / was["total_s"], max(_spread(row), _spread(was), LEAST_NOISE)
        lines.append(
            f"| {title} | {was['total_s']:.3g} | {row['total_s']:.3g} | {ratio:.3f} | +-{100 * noise:.1f} % | "
            f"{verdict(ratio, noise, row, was)} |"
        )
    return lines


def verdict(ratio: float, noise: float, row: Row, was: Row) -> str:
    """In words; two machines are told apart, as a ratio between them says nothing about the code."""
    if row.get("hardware", "").partition(" (sm")[0] != was.get("hardware", "").partition(" (sm")[0]:
        return f"another machine: {was.get('hardware')}"
    if min(len(row["all_s"]), len(was["all_s"])) < 2:
        return "one run each cannot tell"
    if abs(ratio - 1) <= noise:
        return "the same within noise"
    return f"{1 / ratio:.2f}x as fast" if ratio < 1 else f"SLOWER by {100 * (ratio - 1):.1f} %"


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(list(row[name]) if isinstance(row[name], tuple) else row[name]) for name in SAME)


def _spread(row: Row) -> float:
    """How far the runs of a row are apart, relative to their median: a ratio of medians inside it may be chance."""
    return float((row["total_max_s"] - row["total_min_s"]) / row["total_s"])


def _seconds(row: Row | None) -> str:
    return "-" if row is None or row["total_s"] is None else f"{row['total_s']:.3g}"
