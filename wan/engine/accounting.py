"""Counts the forwards a run made and compares them with what its plan said, so that no step is dropped unseen.

A forward is one pass through the trunk for one guidance branch. A cache that answers in its place makes none, and
says beforehand by how much the count may shrink.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from wan.engine.errors import GenerationFailed
from wan.engine.types import Coefficients, Step

Place = tuple[str, str]
"""(expert, branch)."""
Range = tuple[int, int]
"""Fewest and most forwards."""
Expectation = Callable[[Place, Range], Range]
"""How an optimisation changes the forwards planned for one place."""
Trunk = Callable[..., Tensor]


@dataclass
class Forwards:
    """Forwards of one denoise, planned and done, per expert and branch.

    `plain` is how many there would be without optimisations, 0 where that cannot be compared: of a run that goes on.
    """

    planned: dict[Place, Range]
    done: Counter[Place] = field(default_factory=Counter)
    plain: int = 0
    _windowed: set[tuple[int, str]] = field(default_factory=set)

    def counting(self, trunk: Trunk, *, give_away: bool = False) -> Trunk:
        """`trunk`, each call counted for every branch that is stacked in it; all windows of a step are one forward.

        `give_away` says that nobody looks at the tokens after the call, so that the trunk may write them.
        """

        def counted(tokens: Tensor, inputs: Any, condition: Any, step: Step) -> Tensor:
            self.done.update((step.expert, branch) for branch in inputs.branches if self._is_new(step, branch))
            return trunk(tokens, replace(inputs, given_away=give_away), condition, step)

        return counted

    def _is_new(self, step: Step, branch: str) -> bool:
        place = step.index, branch
        counts = not step.window or place not in self._windowed
        if step.window:
            self._windowed.add(place)
        return counts

    def check(self) -> None:
        """Raise GenerationFailed where a count lies outside its plan."""
        for place in dict.fromkeys([*self.planned, *self.done]):
            low, high = self.planned.get(place, (0, 0))
            if not low <= self.done[place] <= high:
                expert, branch = place
                raise GenerationFailed(
                    f"{self.done[place]} forwards of expert {expert!r} for branch {branch!r} were run where the plan "
                    f"has {_said((low, high))}; the video would not be what was asked for. Please report this, with "
                    "the command"
                )

    def describe(self) -> str:
        """ "high 8 cond + 8 uncond, low 12 cond + 12 uncond"; a plan that is a range is given behind the count."""
        experts: dict[str, list[str]] = {}
        for place, planned in self.planned.items():
            expert, branch = place
            within = f" of {_said(planned)}" if planned[0] != planned[1] else ""
            experts.setdefault(expert, []).append(f"{self.done[place]} {branch}{within}")
        return ", ".join(f"{expert} {' + '.join(counts)}" for expert, counts in experts.items())


def planned_forwards(
    steps: Iterable[Step], coefficients: Coefficients, expectations: Iterable[Expectation] = ()
) -> dict[Place, Range]:
    """One forward for every branch of every step whose coefficient is not zero, as `expectations` change it."""
    count: Counter[Place] = Counter()
    for step in steps:
        count.update((step.expert, name) for name, weight in coefficients(step).items() if weight != 0)
    planned = {place: (number, number) for place, number in count.items()}
    for expect in expectations:
        planned = {place: expect(place, within) for place, within in planned.items()}
    return planned


@dataclass
class Report:
    """What a run did and what it took, filled while it goes."""

    forwards: list[Forwards] = field(default_factory=list)
    """One per shot that was denoised."""
    step_seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per expert, the duration of each of its steps."""
    compile_seconds: float = 0.0
    """How much of the steps was spent compiling."""
    encode: str = ""
    """How pictures and frames that are given were encoded in the end, in the words of `decode`; empty without any."""
    decode: str = ""
    """How the latents were decoded in the end: "whole", "in tiles of 32" or "on the CPU ..."."""
    kernels: dict[str, str] = field(default_factory=dict)
    """Per expert, the backend that computed its attention."""

    def describe_forwards(self) -> str:
        return "; ".join(forwards.describe() for forwards in self.forwards)

    def saved_forwards(self) -> tuple[int, int] | None:
        """(forwards done, what the plain run would have done) where they differ and both are known."""
        done, plain = sum(each.done.total() for each in self.forwards), sum(each.plain for each in self.forwards)
        return (done, plain) if done != plain and all(each.plain for each in self.forwards) else None


def _said(within: Range) -> str:
    return str(within[0]) if within[0] == within[1] else f"{within[0]} to {within[1]}"
