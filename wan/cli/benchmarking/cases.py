"""What the quality mode measures: each optimisation of the registry that is not bitwise, the sets of `--quality`, and
groups of settings for longer videos. Values that a switch does not say itself stand in configs/quality/cases.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from wan.cli.args import FLAGS
from wan.cli.benchmarking.matrix import spell
from wan.cli.quality_sets import SETS, read_set
from wan.engine.errors import BadRequest
from wan.engine.options import Option, options_of
from wan.engine.plan import Grade, Optimization
from wan.resources import folder

PLAIN = "plain"
GRADES: tuple[Grade, ...] = ("bitwise", "rounding", "lossy")
"""From harmless to not."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings that are measured together. `label` is what to add to a command line, `kinds` the optimisations.

    `quality` is the name of the set they are, if they are one.
    """

    label: str
    values: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    grade: Grade = "bitwise"
    quality: str = ""

    def words(self, registry: Sequence[type[Optimization]]) -> list[str]:
        """Flags of generate.py."""
        options = {o.name: o for kind in registry for o in options_of(kind)}
        return [word for name, value in self.values.items() for word in _spelled(name, value, options)]


def cases_of(registry: Sequence[type[Optimization]], *, trained: int, cuda: bool) -> list[Case]:
    """One for each row of a video of the trained length, the sets last."""
    table = _table()
    rows = [row for kind in registry if cuda or kind.__name__ not in table["cuda"] for row in _rows(kind, table)]
    cases = {case.label: case for row in rows if (case := make_case(row, registry, trained))}
    for name in SETS:
        if row := read_set(name):
            case = replace(make_case(row, registry, trained), quality=name)
            cases[case.label] = case
    return list(cases.values())


def group_of(name: str, registry: Sequence[type[Optimization]], *, trained: int) -> tuple[list[Case], int]:
    """The cases of a group and how many frames their videos have."""
    group = _table()["groups"][name]
    frames = (trained - 1) * int(group["times"]) + 1
    return [make_case(row, registry, trained) for row in group["tried"]], frames


def groups() -> tuple[str, ...]:
    """Names of the groups."""
    return tuple(_table()["groups"])


def left_out() -> Mapping[str, str]:
    """Optimisations that have no row of their own, and why."""
    reasons: Mapping[str, str] = _table()["left_out"]
    return reasons


def chosen(names: str | None, cases: Sequence[Case]) -> list[Case]:
    """Those of `cases` that `--cases` names: by optimisation, option, value, set, grade or label. Raises BadRequest."""
    if names is None:
        return list(cases)
    found: dict[str, Case] = {}
    for name in (part.strip() for part in names.split(",")):
        hits = [case for case in cases if _is_called(case, name)]
        if not hits:
            able = ", ".join([*dict.fromkeys(kind for case in cases for kind in case.kinds), *SETS, *groups()])
            raise BadRequest(f"--cases {name!r} names none; use {able}, an option, rounding, lossy or a row's label")
        found |= {case.label: case for case in hits}
    return [case for case in cases if case.label in found]


def make_case(row: Mapping[str, Any], registry: Sequence[type[Optimization]], trained: int) -> Case:
    """The case of a table of options (and of flags of the task's inputs); its grade is the worst of its parts."""
    values = {name: trained if value == "trained" else value for name, value in row.items()}
    options = {o.name: o for kind in registry for o in options_of(kind)}
    inputs = {flag.dest for flag in FLAGS}
    unknown = [name for name in values if name not in options and name not in inputs]
    if unknown:
        raise BadRequest(f"configs/quality: {unknown[0]!r} is no option; `make docs` lists them")
    kinds = [kind for kind in registry if any(o.name in values for o in options_of(kind))]
    grades: list[Grade] = [kind.grade for kind in kinds]
    worst = max(grades, key=GRADES.index, default=GRADES[-1])
    label = " ".join(word for name, value in values.items() for word in _spelled(name, value, options))
    return Case(label=label.replace("=", " "), values=values, kinds=tuple(kind.__name__ for kind in kinds), grade=worst)


def _rows(kind: type[Optimization], table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tables of options for one optimisation: what its switch says, and those written down for it."""
    if kind.grade == "bitwise" or kind.__name__ in table["left_out"]:
        return
    switch, names = options_of(kind)[0], {o.name for o in options_of(kind)}
    written = [row for row in table["tried"] if set(row) <= names]
    replaced = switch.is_switch and any(switch.name in row for row in written)
    yield from [] if replaced else _own_values(switch)
    yield from written


def _own_values(switch: Option) -> Iterator[dict[str, Any]]:
    if switch.is_switch:
        yield {switch.name: True}
    for choice in switch.choices:
        if choice not in (switch.default, "off"):
            yield {switch.name: choice}


def _is_called(case: Case, name: str) -> bool:
    texts = [value for value in case.values.values() if isinstance(value, str)]
    return name in (case.label, case.grade, case.quality, *case.kinds, *case.values, *texts)


def _spelled(name: str, value: Any, options: Mapping[str, Option]) -> list[str]:
    """By the flag of an option, which may have another name."""
    known = options.get(name)
    if known is None or known.takes_bool or not isinstance(value, bool):
        flag = known.flags[0].removeprefix("--") if known is not None else name
        return spell(flag, value, {flag: bool(known and known.takes_bool)})
    return [known.flags[0] if value else known.off[0]]


@cache
def _table() -> dict[str, Any]:
    text = (folder("configs") / "quality" / "cases.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
