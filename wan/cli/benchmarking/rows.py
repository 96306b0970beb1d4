"""A row of the report for each variant of a cell: medians, what was used of the machine, and how far the result is from
that of the first variant.

A figure that was not measured is None, and `not_measured` says why.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wan.cli.benchmarking import quality
from wan.cli.benchmarking.ceilings import Ceilings
from wan.cli.benchmarking.power import FIELDS
from wan.cli.benchmarking.processes import Outcome
from wan.cli.benchmarking.trial import Ready, Trial
from wan.cli.benchmarking.upstream import stage_differences
from wan.cli.checkpoint import SHIPPED

Row = dict[str, Any]

MEASURES = (
    "total_s", "total_min_s", "total_max_s", "text_s", "denoise_s", "decode_s", "step_s", "peak_gib", "host_gib",
    "allocated_gib", "reserved_gib", "forward_tflop", "mfu", *FIELDS, "dollars", "latents_differ", "frames_max",
    "frames_mean", "psnr_db", "ssim", "lpips", "reads_as",
)  # fmt: skip
"""Figures that every row has, be they None."""


def rows_of(outcomes: Sequence[Outcome], common: Mapping[str, Any], price_per_hour: float | None) -> list[Row]:
    """The rows of one cell. A variant is compared with the first one of its dtype that finished."""
    flop = next((o.watched.seen.flop for o in outcomes if o.watched and o.watched.seen and o.watched.seen.flop), 0)
    rows: list[Row] = []
    for outcome in outcomes:
        variant = outcome.variant
        row: Row = {
            "variant": variant.name,
            "runner": variant.runner,
            "dtype": variant.dtype or "as the task's",
            "status": "ok",
            "reason": "",
            **dict.fromkeys(MEASURES),
            "components": {},
            "steps_s": {},
            "parts": {},
            "reference": "",
            "stages_apart": [],
            "not_measured": {},
            **common,
        }
        rows.append(row)
        if outcome.ready is not None:
            row |= _machine(outcome.ready, [other.ready.ceilings for other in outcomes if other.ready is not None])
        if outcome.failure is not None:
            row |= {"status": "failed", "reason": str(outcome.failure)}
            continue
        row |= _speed(outcome.trials, common["steps"])
        _use(row, outcome, flop)
        if price_per_hour is not None:
            row["dollars"] = row["total_s"] / 3600 * price_per_hour
        _likeness(row, outcome, outcomes)
    return rows


def distance(trial: Trial, reference: Trial) -> float:
    """Relative L2 distance of final latents."""
    import numpy as np

    return float(np.linalg.norm(trial.latents - reference.latents) / np.linalg.norm(reference.latents))


def _machine(ready: Ready, ceilings: Sequence[Ceilings]) -> Row:
    """The machine is measured for every variant, at a quiet moment or not: its best counts for all."""
    dtype = ready.ceilings.dtype
    return {
        "plan": ready.plan,
        "hardware": ready.hardware,
        "versions": " ".join(f"{name} {version}" for name, version in ready.versions.items()),
        "machine": dict(ready.machine),
        "ceiling_dtype": dtype,
        "ceiling_tflops": round(max(each.matmul_tflops for each in ceilings if each.dtype == dtype), 4),
        "copy_gb_s": round(max(each.copy_gb_s for each in ceilings), 2),
    }


def _speed(trials: Sequence[Trial], steps: int) -> Row:
    seconds = [trial.seconds for trial in trials]
    stages = {name: _median(t.stages.get(name, 0.0) for t in trials) for name in ("text", "denoise", "decode")}
    names = dict.fromkeys(name for trial in trials for name in trial.components)
    return {
        "total_s": statistics.median(seconds),
        "total_min_s": min(seconds),
        "total_max_s": max(seconds),
        **{f"{name}_s": value for name, value in stages.items()},
        "step_s": stages["denoise"] / steps,
        "all_s": [round(value, 4) for value in seconds],
        "components": {name: _median(t.components.get(name, 0.0) for t in trials) for name in names},
        "steps_s": {name: _median(t.steps[name] for t in trials) for name in trials[0].steps},
    }


def _use(row: Row, outcome: Outcome, flop: int) -> None:
    """Memory, power, and the share of the measured ceiling that the transformers' arithmetic makes up."""
    trials, missing = outcome.trials, row["not_measured"]
    for name in ("host", "allocated", "reserved"):
        if any(name in trial.peaks for trial in trials):
            row[f"{name}_gib"] = max(trial.peaks.get(name, 0) for trial in trials) / 2**30
    row["peak_gib"] = row["host_gib"] if row["allocated_gib"] is None else row["allocated_gib"]
    last = trials[-1]
    if last.readings:
        row |= last.readings
    else:
        missing |= dict.fromkeys(FIELDS, last.missing or "this variant's process does not tell")
    if outcome.watched is not None and outcome.watched.seen is not None:
        row["parts"] = dict(outcome.watched.seen.parts)
    if flop and last.forwards:
        row["forward_tflop"] = flop / 1e12
        row["mfu"] = last.forwards * flop / 1e12 / row["denoise_s"] / row["ceiling_tflops"]
    else:
        missing["mfu"] = "its forwards are not counted" if flop else "no variant's forward was counted in a warm-up run"


def _likeness(row: Row, outcome: Outcome, outcomes: Sequence[Outcome]) -> None:
    """Latents and frames against those of the reference, which has no such figures itself."""
    import torch

    done = [each for each in outcomes if each.failure is None]
    reference = next(each for each in done if each.variant.dtype == outcome.variant.dtype)
    row["reference"] = reference.variant.name
    frames = _frames(outcome)
    if frames is not None and row["task"] in SHIPPED and len(frames) > 1:
        row["reads_as"] = quality.reads_as(torch.from_numpy(frames))
    if reference is outcome:
        return
    row["latents_differ"] = distance(outcome.trials[-1], reference.trials[-1])
    theirs = _frames(reference)
    if frames is not None and theirs is not None:
        found, missing = quality.compare(torch.from_numpy(frames), torch.from_numpy(theirs))
        row |= found
        row["not_measured"] |= missing
    if outcome.variant.runner == "upstream" and reference.watched is not None and outcome.watched is not None:
        pair = None if frames is None or theirs is None else (theirs, frames)
        row["stages_apart"] = [list(each) for each in stage_differences(reference.watched, outcome.watched, pair)]


def _frames(outcome: Outcome) -> Any:
    """uint8 [N, H, W, 3], read from the disk as they are needed; None where none were kept."""
    import numpy as np

    return None if outcome.frames is None else np.load(outcome.frames, mmap_mode="c")


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
