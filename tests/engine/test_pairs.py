"""Any two optimisations work together or say why not, naming both.

Many at once prove all their pairs: every pair that is not refused is in one of a few groups, and each group is run.
What a group's failure is down to, the square tells, pair by pair: `make test-slow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.compiling import Compiled
from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.options import options_of
from wan.engine.plan import Optimization, Plan, switch_flag

Kind = type[Optimization]

DATA = Path(__file__).parents[1] / "data"
CPU = Hardware(device=torch.device("cpu"), name="CPU")
EXAMPLES: dict[str, dict[str, Any]] = {
    "lora": {"lora": str(DATA / "lora-tiny.safetensors")},
    "cache": {"cache": "mag", "cache_table": str(DATA / "cache-tiny.json")},
    "cfg_interval": {"cfg_interval": "0-0.5"},
    "skip_layers": {"skip_layers": "1"},
    "context_frames": {"context_frames": 81},
    "few_step": {"few_step": "fastwan-3step", "few_step_distilled": True},
}
"""What to ask for where the switch's value is not just on."""
PAIRS = list(combinations(registry(), 2))
SIZE: dict[str, Any] = {"size": (32, 32), "frame_num": 1, "sampling_steps": 2, "seed": 1, "offload_model": None}
GROUP = 12
"""Optimisations in a group: few enough that none of them hides what another one does."""


def switched_on(cls: Kind) -> dict[str, Any]:
    """The first value of the class's switch that is not its default."""
    switch = options_of(cls)[0]
    if switch.name in EXAMPLES:
        return EXAMPLES[switch.name]
    candidates = switch.choices or ((True, False) if switch.is_switch else (1,))
    return {switch.name: next(value for value in candidates if value != switch.default)}


def plan_of(kinds: Iterable[Kind]) -> Plan:
    """All of them on, registered in this order."""
    kinds = tuple(kinds)
    return Plan.of(kinds, {name: value for kind in kinds for name, value in switched_on(kind).items()})


@cache
def refusal(pair: tuple[Kind, Kind]) -> str:
    """Why the two do not go together; empty where they do."""
    try:
        plan_of(pair).check(CPU)
    except IncompatibleOptions as error:
        return str(error)
    return ""


def groups() -> Iterator[tuple[Kind, ...]]:
    """Optimisations that go together, such that every pair that does is in one of the groups."""
    allowed = {frozenset(pair) for pair in PAIRS if not refusal(pair)}
    unproven = set(allowed)
    while unproven:
        group = list(min(unproven, key=_named))
        while len(group) < GROUP:
            joining = [kind for kind in registry() if all({kind, member} in allowed for member in group)]
            if not joining:
                break
            group.append(max(joining, key=lambda kind: sum({kind, member} in unproven for member in group)))
        unproven -= {frozenset(pair) for pair in combinations(group, 2)}
        yield tuple(kind for kind in registry() if kind in group)


def _named(pair: frozenset[Kind]) -> list[str]:
    return sorted(kind.__name__ for kind in pair)


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "backend", "eager")


@pytest.fixture
def video(tiny_checkpoint: Path, tiny_config: Any) -> Any:
    def made(kinds: Iterable[Kind]) -> Tensor:
        pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", optimizations=plan_of(kinds))
        found = pipe.generate("a red bird", **SIZE)
        assert found is not None and torch.isfinite(found).all()
        return found

    return made


def test_a_pair_that_is_refused_is_refused_by_both_names() -> None:
    refused = {pair: text for pair in PAIRS if (text := refusal(pair))}
    assert len(refused) > 5
    for pair, text in refused.items():
        assert all(switch_flag(cls) in text for cls in pair), text


GROUPS = list(groups())


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "+".join(cls.__name__ for cls in group))
def test_the_others_compose_in_either_order_within_what_they_promise(group: tuple[Kind, ...], video: Any) -> None:
    """Two of one order commute, bit by bit; what is not lossy keeps to its tolerance beside all that is."""
    together = video(group)
    assert torch.equal(video(group[::-1]), together)
    exact = [kind for kind in group if kind.grade != "lossy"]
    reference = video(kind for kind in group if kind not in exact)
    distance = (together - reference).norm() / reference.norm()
    assert distance <= sum(kind.tolerance for kind in exact), exact


def test_every_pair_is_in_a_group_or_refused() -> None:
    together = {frozenset(pair) for group in GROUPS for pair in combinations(group, 2)}
    assert {frozenset(pair) for pair in PAIRS if not refusal(pair)} == together


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(cls.__name__ for cls in pair))
def test_every_pair_alone_composes_in_either_order_or_is_refused(pair: tuple[Kind, Kind], video: Any) -> None:
    if not refusal(pair):
        orders = (pair, pair[::-1]) if pair[0].order == pair[1].order else (pair,)
        videos = [video(kinds) for kinds in orders]
        assert torch.equal(videos[0], videos[-1])
