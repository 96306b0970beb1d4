"""What TeaCache and MagCache know about a model: numbers that somebody measured on that very model.

`tables.json` holds the published ones with their sources and the demo's; `tools/calibrate_cache.py` makes others. No
model is given another one's numbers unless the user names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from wan.engine.errors import BadRequest


@dataclass(frozen=True, kw_only=True)
class MagTable:
    """Per expert, how the residual's norm changes from step to step and the share of steps that is never skipped."""

    ratios: Mapping[str, Sequence[float]]
    retain: Mapping[str, float]
    threshold: float
    most: int
    """Steps skipped in a row."""


@dataclass(frozen=True, kw_only=True)
class TeaTable:
    """Per expert, the polynomial from movement of the time embedding to movement of the output, and a threshold."""

    coefficients: Mapping[str, Sequence[float]]
    threshold: float


@cache
def published() -> dict[str, Any]:
    """Everything in `tables.json`, by the name of the model."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
    return found


def choose(name: str | None, model: str, cache: str) -> tuple[str, Mapping[str, Any]]:
    """The table `name`, published or a file, or the one that was measured on `model`, and what it is called.

    `model` is the name of a configuration. Raises BadRequest.
    """
    if name is None:
        candidates = [each for each, table in published().items() if table["model"] == model and cache in table]
        if len(candidates) != 1:
            raise BadRequest(_undecided(candidates, cache))
        name = candidates[0]
    if name in published():
        return name, published()[name]
    path = Path(name)
    if not path.is_file():
        raise BadRequest(
            f"--cache_table {name!r} is neither a file nor one of {', '.join(published())}; "
            "tools/calibrate_cache.py makes one"
        )
    return name, _measured(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _measured(path: Path, changed: int) -> Mapping[str, Any]:
    """The table in a file, read again only where it has changed: every run asks for it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"--cache_table {str(path)!r} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise BadRequest(f"--cache_table {str(path)!r} is no table: tools/calibrate_cache.py makes one")
    return table


def mag_table(name: str, table: Mapping[str, Any], experts: Sequence[str]) -> MagTable:
    """The MagCache part of a table. Raises BadRequest where it is missing or of other experts."""
    given = _part(name, table, "mag")
    try:
        found = MagTable(
            ratios={e: [float(x) for x in given["ratios"][e]] for e in given["ratios"]},
            retain={e: float(x) for e, x in given["retain"].items()},
            threshold=float(given["threshold"]),
            most=int(given["most"]),
        )
        _check_experts(name, found.ratios.keys() & found.retain.keys(), experts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"--cache_table {name!r} is damaged in 'mag': {error!r}; make it again") from error
    return found


def tea_table(name: str, table: Mapping[str, Any], experts: Sequence[str], signal: str) -> TeaTable:
    """The TeaCache part of a table for one signal. Raises BadRequest where it is missing or of other experts."""
    given = _part(name, table, "tea")
    if signal not in given:
        raise BadRequest(
            f"--cache_signal {signal}: table {name!r} has coefficients for {', '.join(given)} only; choose that"
        )
    try:
        found = TeaTable(
            coefficients={e: [float(x) for x in row] for e, row in given[signal]["coefficients"].items()},
            threshold=float(given[signal]["threshold"]),
        )
        _check_experts(name, found.coefficients, experts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"--cache_table {name!r} is damaged in 'tea': {error!r}; make it again") from error
    return found


def _undecided(candidates: Sequence[str], cache: str) -> str:
    if candidates:
        return (
            f"--cache {cache}: which table this checkpoint needs cannot be told from its files; pass --cache_table "
            + " or ".join(map(repr, candidates))
        )
    return (
        f"--cache {cache}: nobody has published a table for this model; make one with tools/calibrate_cache.py and "
        "pass it with --cache_table, or use --cache easy, which needs none"
    )


def _part(name: str, table: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    if method not in table:
        there = [other for other in ("tea", "mag") if other in table]
        raise BadRequest(
            f"--cache {method}: table {name!r} has nothing for it; use --cache {' or '.join([*there, 'easy'])}"
        )
    part: Mapping[str, Any] = table[method]
    return part


def _check_experts(name: str, known: Any, experts: Sequence[str]) -> None:
    if lacking := [expert for expert in experts if expert not in known]:
        raise BadRequest(
            f"--cache_table {name!r} knows the experts {', '.join(sorted(known))}, this model has "
            f"{', '.join(experts)}; {lacking[0]!r} is missing"
        )
