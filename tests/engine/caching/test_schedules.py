"""The published rules give the published schedules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wan.engine.caching.schedules import magcache_skips, polynomial, resampled, retained, teacache_skips
from wan.engine.caching.tables import published

SCHEDULES = json.loads((Path(__file__).parents[2] / "data" / "magcache_schedules.json").read_text())
"""Which forwards MagCache's own rule computes (1) and skips (0), by model; no step is forced beyond that rule."""
CASES = [(model, row) for model, rows in SCHEDULES.items() for row in rows]


def may_skip(row: dict[str, Any]) -> set[int]:
    """The steps MagCache's program lets its rule judge, by its count of forwards, two a step."""
    forwards, share = 2 * row["steps"], row["R"]
    split = 2 * row.get("high_noise_steps", 0)
    rest = forwards - split
    judged = {
        None: lambda count: count >= int(forwards * share),
        "t2v": lambda count: int(split * share) <= count < split or count > rest * share + split,
        "i2v": lambda count: count >= int(split + rest * share),
    }[row.get("split_mode")]
    return {i for i in range(row["steps"]) if judged(2 * i)}


@pytest.mark.parametrize(("model", "row"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_mag_skips_what_the_published_program_skips(model: str, row: dict[str, Any]) -> None:
    ratios = [x for expert in published()[model]["mag"]["ratios"].values() for x in expert]
    skipped = magcache_skips(resampled(ratios, row["steps"]), may_skip(row), row["E"], row["K"])
    assert "".join("0" if i in skipped else "1" for i in range(row["steps"])) == row["cond"]


def test_tea_skips_while_the_summed_estimate_stays_below_the_threshold() -> None:
    distances = [0.0, 0.1, 0.2, 0.3, 0.1, 0.1, 0.9]
    # Estimates x**2 + 1: 1.01, 1.04, 1.09, 1.01, 1.01; two of them stay below 2.2, the third does not.
    assert teacache_skips(distances, range(1, 6), 2.2, (1.0, 0.0, 1.0)) == {1, 2, 4, 5}


def test_tea_begins_anew_after_a_step_that_must_be_computed() -> None:
    assert teacache_skips([0.0, 1.0, 1.0, 1.0, 1.0], {1, 3, 4}, 1.5, (1.0, 0.0)) == {1, 3}


def test_a_threshold_of_zero_skips_nothing() -> None:
    assert not magcache_skips([1.0] * 9, range(1, 8), 0.0, 9)
    assert not teacache_skips([0.0] * 9, range(1, 8), 0.0, (1.0, 0.0))
    assert not teacache_skips([0.1] * 9, range(1, 8), 0.0, (1.0, -1.0)), "where the estimate is below 0"


def test_the_polynomial_has_its_highest_power_first() -> None:
    assert polynomial((2.0, -1.0, 3.0), 4.0) == 2 * 16 - 4 + 3


@pytest.mark.parametrize(("count", "expected"), [(5, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (1, [0]), (9, [0, 0, 1, 2, 2])])
def test_a_table_for_other_step_counts_gives_the_nearest_entries(count: int, expected: Sequence[int]) -> None:
    assert resampled(range(5), count)[: len(expected)] == expected


def test_the_first_the_last_and_the_retained_steps_are_never_up_for_skipping() -> None:
    assert retained(10, 0.0, last=True) == set(range(1, 9))
    assert retained(10, 0.35, last=False) == set(range(4, 10))
    assert retained(10, 1.0, last=True) == set()
    assert retained(1, 0.0, last=True) == set()
