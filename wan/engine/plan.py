"""How to run: the chosen optimisations, checked together before any weight is read and applied in one fixed order."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.options import Option, check_value, options_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from wan.engine.engine import Engine
    from wan.engine.types import Component

Grade = Literal["bitwise", "rounding", "lossy"]


class Order(enum.IntEnum):
    """When an optimisation is applied. Two of one order commute or conflict."""

    RUNTIME = enum.auto()
    MERGE = enum.auto()
    DTYPE = enum.auto()
    QUANTIZE = enum.auto()
    LAYERS = enum.auto()
    COMPILE = enum.auto()
    SCHEDULE = enum.auto()
    BRANCHES = enum.auto()
    TRUNK = enum.auto()
    SHARD = enum.auto()
    PLACEMENT = enum.auto()
    STEP_CACHE = enum.auto()
    WINDOWS = enum.auto()
    GUIDANCE = enum.auto()


@dataclass(frozen=True)
class Conflict:
    """The class name of another optimisation this one cannot run with, why, and on which hardware (default: all)."""

    other: str
    why: str
    when: Callable[[Hardware], bool] = lambda hardware: True


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Base of every optimisation: a frozen dataclass whose fields are `option()`s, the first one the switch.

    Its moments are all optional. `name` is "dit", "high", "low", "text_encoder", "vae" ... Networks are loaded when
    first used, so what changes a finished network is `finish`; `apply` runs at the start of every run, on cleared
    wrappers and policies. Options of subclasses with `per_call` may be changed for one `generate` call.
    """

    order: ClassVar[Order]
    grade: ClassVar[Grade]
    tolerance: ClassVar[float] = 0.0
    cost: ClassVar[str] = ""
    """What it takes of time or memory in return, in a few words for the table of all options."""
    conflicts: ClassVar[tuple[Conflict, ...]] = ()
    per_call: ClassVar[bool] = False

    @property
    def enabled(self) -> bool:
        """False when the switch has its off value: False, None, 0 or "off"."""
        switch = dataclasses.fields(self)[0]
        return getattr(self, switch.name) not in (False, None, 0, "off")

    def brings(self) -> Mapping[str, Any]:
        """Values it asks for of options, of whichever optimisation, that nobody has set."""
        return {}

    def absolute(self) -> Mapping[str, Any]:
        """Its options that name files, spelled so that they mean the same in any folder."""
        return {}

    def follows(self, before: Optimization) -> bool:
        """Whether a call may have these options where the networks were loaded with those of `before`."""
        return self.per_call

    def check(self, hardware: Hardware) -> None:
        """Raise IncompatibleOptions or MissingPackage if this cannot run here."""

    def check_plan(self, plan: Plan) -> None:
        """Raise IncompatibleOptions or BadRequest if what it needs beside it is not in the plan."""

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
        """Raise BadCheckpoint if this cannot act on a checkpoint of these shapes. Nothing has been read but headers."""

    def check_component(self, component: Component) -> None:
        """Raise if this cannot act on a network; `component.build()` makes it on the meta device."""

    def convert(self, module: nn.Module, name: str) -> None:
        """Change the module while it is on the meta device."""

    def transform(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Iterable[tuple[str, Tensor]]:
        """Change, rename or add to the stream of weights."""
        return weights

    def place(self, module: nn.Module, name: str, engine: Engine) -> Mapping[str, Tensor | torch.device]:
        """Key -> memory that a weight is written into, or where it lands; others land as the placement policy says."""
        return {}

    def finish(self, module: nn.Module, name: str, engine: Engine) -> None:
        """Change a network that has just been loaded: swap attention backends, compile its blocks."""

    def apply(self, engine: Engine) -> None:
        """Act on the engine: process-wide settings, seam wrappers, placement policies."""


O = TypeVar("O", bound=Optimization)


@dataclass(frozen=True)
class Plan:
    """A set of optimisations. Frozen: `changed` returns another plan."""

    optimizations: tuple[Optimization, ...] = ()
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Option name -> where its value comes from and, after a colon, why ("flag", "preset h100: ...")."""
    brought: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    """Options whose value another one brought (`Optimization.brings`); they go when it goes."""

    @classmethod
    def of(
        cls,
        registry: Iterable[type[Optimization]],
        values: Mapping[str, Any],
        *,
        source: str = "keyword",
        reasons: Mapping[str, str] | None = None,
    ) -> Plan:
        """The plan these option values describe. Options not in `values`, or None there, keep their defaults.

        Raises IncompatibleOptions for a name no optimisation declares, BadRequest for a value it does not accept.
        """
        registry = tuple(registry)
        known = {o.name: (o, cls_) for cls_ in registry for o in options_of(cls_)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise IncompatibleOptions(
                f"{source}: no option is called {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        chosen: dict[type[Optimization], dict[str, Any]] = {cls_: {} for cls_ in registry}
        for name, value in values.items():
            if value is not None:
                declared, owner = known[name]
                chosen[owner][name] = check_value(declared, value, source)
        brought = _bring(chosen, known)
        made = tuple(owner(**fields) for owner, fields in chosen.items())
        return cls(made, {**(reasons or {}), **brought}, frozenset(brought))

    def changed(
        self, registry: Iterable[type[Optimization]], values: Mapping[str, Any], *, source: str = "keyword"
    ) -> Plan:
        """This plan with some option values replaced; None leaves a value as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        return Plan.of(
            registry, self.own_values() | given, source=source, reasons={**self.reasons, **dict.fromkeys(given, source)}
        )

    def values(self) -> dict[str, Any]:
        """Option name -> value, for every option of every optimisation in the plan."""
        return {name: value for optimization in self.optimizations for name, value in vars(optimization).items()}

    def own_values(self) -> dict[str, Any]:
        """The same without what was brought: what makes this plan again."""
        return {name: value for name, value in self.values().items() if name not in self.brought}

    def enabled(self) -> Iterator[Optimization]:
        """Those switched on, in the order of application."""
        return iter(sorted((o for o in self.optimizations if o.enabled), key=lambda o: o.order))

    def get(self, kind: type[O]) -> O:
        """The optimisation of this class, with its defaults where the plan has none."""
        return next((o for o in self.optimizations if isinstance(o, kind)), None) or kind()

    def check(self, hardware: Hardware) -> None:
        """Raise the first reason why this plan cannot run on `hardware`, naming both sides and the cure."""
        active = {type(o).__name__: o for o in self.enabled()}
        for optimization in active.values():
            optimization.check(hardware)
            optimization.check_plan(self)
            for conflict in optimization.conflicts:
                if conflict.other in active and conflict.when(hardware):
                    mine, other = (switch_flag(type(o)) for o in (optimization, active[conflict.other]))
                    raise IncompatibleOptions(
                        f"{mine} and {other} do not go together: {conflict.why}. Drop one of them."
                    )

    def idle(self) -> Iterator[str]:
        """What flags say of optimisations that are off, a line for each."""
        for optimization in self.optimizations:
            switch, *others = options_of(type(optimization))
            if optimization.enabled or getattr(optimization, switch.name) not in (False, None, 0, "off", ()):
                continue
            for o in others:
                if self.reasons.get(o.name) == "flag" and getattr(optimization, o.name) != o.default:
                    said = f"--{o.name} {getattr(optimization, o.name)}"
                    yield f"{said} does nothing: {switch_flag(type(optimization))} is off"

    def describe(self) -> str:
        """One line for the log: what is on, and where that comes from where it is known."""
        parts = []
        for optimization in self.enabled():
            for o in options_of(type(optimization)):
                value = getattr(optimization, o.name)
                if value != o.default or o.name in self.reasons:
                    reason = f" ({self.reasons[o.name].partition(': ')[0]})" if o.name in self.reasons else ""
                    parts.append(f"{o.name}={value}{reason}")
        return ", ".join(parts) or "plain"


def _bring(
    chosen: dict[type[Optimization], dict[str, Any]], known: Mapping[str, tuple[Option, type[Optimization]]]
) -> dict[str, str]:
    """Add to `chosen` what those switched on ask for and nobody has set; option -> the flag it came with."""
    found: dict[str, str] = {}
    for asking in [owner(**fields) for owner, fields in chosen.items()]:
        flag = switch_flag(type(asking))
        for name, value in asking.brings().items() if asking.enabled else ():
            if name in known and chosen[known[name][1]].get(name, known[name][0].default) == known[name][0].default:
                declared, owner = known[name]
                chosen[owner][name] = check_value(declared, value, flag)
                found[name] = flag
    return found


def options(registry: Iterable[type[Optimization]]) -> list[Option]:
    """Every option of every optimisation in `registry`."""
    return [o for cls in registry for o in options_of(cls)]


def switch_flag(kind: type[Optimization]) -> str:
    """The flag a user types to switch this optimisation on."""
    return options_of(kind)[0].flags[0]
