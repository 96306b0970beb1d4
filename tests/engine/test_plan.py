"""A plan takes option values from anywhere, checks them before any weight is read, and is applied in one order."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
import torch

from wan.engine.errors import BadRequest, IncompatibleOptions, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.options import add_arguments, option, options_of
from wan.engine.plan import Conflict, Optimization, Order, Plan, options, switch_flag

CPU = Hardware(device=torch.device("cpu"), name="CPU")
OLD = Hardware(device=torch.device("cuda", 0), name="old card", sm=(8, 6), total_memory=1, free_memory=1)


@dataclass(frozen=True, kw_only=True)
class Halve(Optimization):
    """A toy that conflicts with another one on old cards."""

    order = Order.QUANTIZE
    grade = "lossy"
    conflicts = (Conflict("Fuse", "old cards cannot fuse halves", when=lambda hardware: hardware.sm < (8, 9)),)
    halve: Literal["off", "weight", "scaled"] = option("off", "keep weights in half")
    halve_rows: int = option(16, "rows that share a scale")

    def check(self, hardware: Hardware) -> None:
        if self.halve == "scaled" and hardware.sm < (8, 9):
            raise UnsupportedHardware(f"--halve scaled needs sm_89, this is {hardware.name}: use --halve weight")


@dataclass(frozen=True, kw_only=True)
class Fuse(Optimization):
    """A toy switch with a keyword that is not its flag."""

    order = Order.LAYERS
    grade = "rounding"
    use_fuse: bool = option(False, "fuse layers", flags=("--fuse", "--use_fuse"), off=("--no-fuse",))


@dataclass(frozen=True, kw_only=True)
class Early(Optimization):
    """A toy that is on unless told otherwise."""

    order = Order.RUNTIME
    grade = "bitwise"
    early: bool = option(True, "act first")


TOYS: tuple[type[Optimization], ...] = (Fuse, Halve, Early)


def test_no_values_give_the_defaults() -> None:
    plan = Plan.of(TOYS, {})
    assert plan.optimizations == (Fuse(), Halve(), Early())
    assert plan.get(Halve).halve_rows == 16
    assert Plan().get(Halve) == Halve()


def test_enabled_optimisations_come_in_the_order_of_application() -> None:
    plan = Plan.of(TOYS, {"use_fuse": True, "halve": "weight"})
    assert [type(o) for o in plan.enabled()] == [Early, Halve, Fuse]
    assert [type(o) for o in Plan.of(TOYS, {"early": False}).enabled()] == []


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(IncompatibleOptions, match=r"preset h100: .*'halves'.*halve, halve_rows, use_fuse"):
        Plan.of(TOYS, {"halves": "weight"}, source="preset h100")


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(BadRequest, match="keyword: halve = 'third' is not one of off, weight, scaled"):
        Plan.of(TOYS, {"halve": "third"})


def test_none_leaves_an_option_as_it_is() -> None:
    plan = Plan.of(TOYS, {"halve": "weight", "use_fuse": None})
    assert plan.get(Fuse).use_fuse is False
    assert plan.changed(TOYS, {"halve": None, "use_fuse": True}).get(Halve).halve == "weight"


def test_a_changed_plan_leaves_the_first_one_alone() -> None:
    plan = Plan.of(TOYS, {"halve": "weight"}, reasons={"halve": "preset h100"})
    other = plan.changed(TOYS, {"use_fuse": True}, source="generate()")
    assert (plan.get(Fuse).use_fuse, other.get(Fuse).use_fuse) == (False, True)
    assert other.get(Halve) == plan.get(Halve)
    assert other.reasons == {"halve": "preset h100", "use_fuse": "generate()"}
    assert plan.reasons == {"halve": "preset h100"}


def test_a_conflict_names_both_flags_the_reason_and_the_cure() -> None:
    plan = Plan.of(TOYS, {"halve": "weight", "use_fuse": True})
    with pytest.raises(IncompatibleOptions, match=r"--halve and --fuse .*cannot fuse halves.*Drop one") as caught:
        plan.check(OLD)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_conflict_holds_only_where_it_says_and_only_when_both_are_on() -> None:
    new = dataclasses.replace(OLD, sm=(9, 0))
    Plan.of(TOYS, {"halve": "weight", "use_fuse": True}).check(new)
    Plan.of(TOYS, {"halve": "weight"}).check(OLD)
    Plan.of(TOYS, {"use_fuse": True}).check(OLD)


def test_an_optimisation_refuses_hardware_it_cannot_use() -> None:
    with pytest.raises(UnsupportedHardware, match="sm_89.*--halve weight"):
        Plan.of(TOYS, {"halve": "scaled"}).check(OLD)


def test_the_description_says_what_is_on_and_why() -> None:
    assert Plan.of(TOYS, {"early": False}).describe() == "plain"
    plan = Plan.of(TOYS, {"halve": "weight", "halve_rows": 8}, reasons={"halve": "preset h100: fits"})
    assert plan.describe() == "halve=weight (preset h100), halve_rows=8"


def test_a_flag_that_does_nothing_is_told_and_a_presets_value_is_not() -> None:
    def told(source: str, **values: Any) -> list[str]:
        return list(Plan.of(TOYS, values, reasons=dict.fromkeys(values, source)).idle())

    assert told("flag", halve_rows=8) == ["--halve_rows 8 does nothing: --halve is off"]
    assert not told("preset h100", halve_rows=8) + told("flag", halve_rows=16) + told("flag", early=False)
    assert not told("flag", halve_rows=8, halve="weight")


@dataclass(frozen=True, kw_only=True)
class Toy(Optimization):
    """A new optimisation: everything it needs is in this class."""

    order = Order.STEP_CACHE
    grade = "lossy"
    tolerance = 0.1
    conflicts = (Conflict("Compile", "a toy breaks when bent"),)
    toy_level: int = option(0, "how much to play; 0 is off")


def test_a_new_optimisation_is_one_class() -> None:
    """Flag, keyword, checks, conflicts and order come from the class, beside the real ones."""
    everything = (*registry(), Toy)
    parser = argparse.ArgumentParser()
    add_arguments(parser, options(everything))
    spelled = vars(parser.parse_args(["--toy_level", "2"]))
    plan = Plan.of(everything, {o.name: spelled[o.name] for o in options(everything)})
    assert plan.get(Toy).toy_level == 2
    assert list(plan.enabled())[-1] == Toy(toy_level=2)
    plan.check(CPU)
    with pytest.raises(
        IncompatibleOptions, match="--toy_level and --compile do not go together: a toy breaks when bent"
    ):
        plan.changed(everything, {"compile": True}).check(CPU)


def test_registered_optimisations_are_complete_and_do_not_share_names_or_flags() -> None:
    found = registry()
    names = [o.name for o in options(found)]
    flags = [flag for o in options(found) for flag in (*o.flags, *o.off)]
    assert len(names) == len(set(names))
    assert len(flags) == len(set(flags))
    for cls in found:
        assert isinstance(cls.order, Order), cls
        assert cls.grade in ("bitwise", "rounding", "lossy"), cls
        assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), cls
        assert cls.cost and cls.cost[-1] not in ".:,", cls
        assert switch_flag(cls).startswith("--")
        assert all(field.metadata.get("option") for field in dataclasses.fields(cls)), cls
        assert all(o.help for o in options_of(cls)), cls
        known = {other.__name__ for other in found}
        assert all(conflict.other in known for conflict in cls.conflicts), cls


def toggled(o: Any) -> tuple[list[str], Any]:
    """A spelling of option `o` that is not its default, and the value it means."""
    if o.choices:
        value = next(choice for choice in o.choices if choice != o.default)
        return [o.flags[0], str(value)], value
    if o.is_switch:
        if o.default:
            return [o.off[0]], False
        return ([o.flags[0], "True"] if o.takes_bool else [o.flags[0]]), True
    kinds = get_args(o.type) or (o.type,)
    if o.default == ():
        return [o.flags[0], "3"], ("3",)
    kind = next(kind for kind in (int, float, str) if kind in kinds)
    return [o.flags[0], "3"], kind("3")


@pytest.mark.parametrize("o", options(registry()), ids=lambda o: o.name)
def test_every_registered_option_round_trips_between_flag_and_keyword(o: Any) -> None:
    words, value = toggled(o)
    parser = argparse.ArgumentParser()
    add_arguments(parser, options(registry()))
    spelled = vars(parser.parse_args(words))
    by_flag = Plan.of(registry(), {each.name: spelled[each.name] for each in options(registry())})
    assert by_flag == Plan.of(registry(), {o.name: value})
    assert by_flag.values()[o.name] == value
    assert by_flag != Plan.of(registry(), {})
    assert by_flag.changed(registry(), {o.name: o.default}).values().get(o.name) == (
        value if o.default is None else o.default
    )
