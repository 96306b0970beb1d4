"""One declaration makes a flag, its off spelling, a keyword and a preset key, and all of them check alike."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from wan.engine.errors import BadRequest, WanError
from wan.engine.options import Option, add_arguments, check_value, option, options_of, str2bool


@dataclass(frozen=True, kw_only=True)
class Toy:
    fast: bool = option(False, "a switch", flags=("--fast", "--use_fast"), off=("--no-fast",))
    warm: bool = option(True, "a switch that is on")
    park: bool | None = option(None, "a switch with upstream's spelling", off=("--no-park",), takes_bool=True)
    mode: Literal["off", "weight", "scaled"] = option("off", "one of three")
    blocks: int = option(0, "a count")
    strength: float = option(1.0, "a number")
    device: str | None = option(None, "a name")
    internal: int = 3


OPTIONS = {o.name: o for o in options_of(Toy)}


def parse(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser, OPTIONS.values())
    return {name: value for name, value in vars(parser.parse_args(words)).items() if name in OPTIONS}


def test_only_declared_fields_are_options() -> None:
    assert list(OPTIONS) == ["fast", "warm", "park", "mode", "blocks", "strength", "device"]


def test_what_is_not_spelled_is_none_so_that_presets_can_fill_it() -> None:
    assert set(parse().values()) == {None}


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--fast"], "fast", True),
        (["--use_fast"], "fast", True),
        (["--no-fast"], "fast", False),
        (["--warm"], "warm", True),
        (["--no-warm"], "warm", False),
        (["--park", "True"], "park", True),
        (["--park", "no"], "park", False),
        (["--no-park"], "park", False),
        (["--mode", "scaled"], "mode", "scaled"),
        (["--blocks", "4"], "blocks", 4),
        (["--strength", "0.5"], "strength", 0.5),
        (["--device", "cpu"], "device", "cpu"),
    ],
)
def test_flag_and_keyword_mean_the_same(words: list[str], name: str, value: Any) -> None:
    given = parse(*words)
    assert given.pop(name) == value
    assert set(given.values()) == {None}
    assert check_value(OPTIONS[name], value, "keyword") == value
    assert type(check_value(OPTIONS[name], value, "keyword")) is type(value)


@pytest.mark.parametrize("switch", [o for o in OPTIONS.values() if o.is_switch], ids=lambda o: o.name)
def test_every_switch_has_an_off_spelling(switch: Option) -> None:
    assert switch.off
    assert parse(switch.off[0])[switch.name] is False


@pytest.mark.parametrize(
    "words",
    [
        ["--fast", "--no-fast"],
        ["--no-fast", "--use_fast"],
        ["--park", "True", "--no-park"],
        ["--no-park", "--park", "yes"],
        ["--blocks", "2", "--blocks", "3"],
        ["--mode", "off", "--mode", "weight"],
    ],
)
def test_contradicting_spellings_exit_2_and_name_both(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "contradict" in message
    assert all(word in message for word in words if word.startswith("--"))


@pytest.mark.parametrize(
    "words", [["--fast", "--use_fast"], ["--park", "False", "--no-park"], ["--no-fast", "--no-fast"]]
)
def test_saying_the_same_twice_is_fine(words: list[str]) -> None:
    assert next(value for value in parse(*words).values() if value is not None) is ("--use_fast" in words)


@pytest.mark.parametrize("words", [["--mode", "int3"], ["--blocks", "many"], ["--park", "maybe"], ["--park"]])
def test_a_wrong_value_exits_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mode", "int3", "'int3' is not one of off, weight, scaled"),
        ("mode", True, "True is not one of"),
        ("blocks", "4", "'4' is not an int"),
        ("blocks", 4.0, "4.0 is not an int"),
        ("blocks", True, "True is not an int"),
        ("fast", 1, "1 is not a bool"),
        ("fast", "yes", "'yes' is not a bool"),
        ("strength", "strong", "'strong' is not a float"),
        ("strength", True, "True is not a float"),
        ("device", 0, "0 is not a str"),
        ("blocks", None, "None is not an int"),
    ],
)
def test_keywords_and_presets_are_checked_and_named(name: str, value: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=f"^preset h100: {name} = {words}") as caught:
        check_value(OPTIONS[name], value, "preset h100")
    assert isinstance(caught.value, WanError) and isinstance(caught.value, ValueError)


def test_whole_numbers_are_accepted_where_a_float_is_wanted() -> None:
    value = check_value(OPTIONS["strength"], 2, "keyword")
    assert (value, type(value)) == (2.0, float)


def test_none_is_accepted_where_it_is_declared() -> None:
    assert check_value(OPTIONS["park"], None, "keyword") is None
    assert check_value(OPTIONS["device"], None, "keyword") is None


@pytest.mark.parametrize("text", ["yes", "TRUE", "t", "Y", "1"])
def test_upstreams_spellings_of_true(text: str) -> None:
    assert str2bool(text) is True


@pytest.mark.parametrize("text", ["no", "False", "F", "n", "0"])
def test_upstreams_spellings_of_false(text: str) -> None:
    assert str2bool(text) is False


def test_other_spellings_of_booleans_are_refused() -> None:
    assert str2bool(True) is True
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe'"):
        str2bool("maybe")
