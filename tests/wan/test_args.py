"""The flags: upstream's of both versions under their names, types, defaults and choices, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from wan.cli.args import FLAGS, MISSING, SOLVERS, build_parser, parse, unavailable
from wan.engine.errors import BadRequest
from wan.engine.optimizations import registry
from wan.engine.options import Option, option, options_of
from wan.engine.plan import options

TABLE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "upstream_flags.json").read_text())
UPSTREAM: dict[str, Any] = TABLE["flags"]
OPTIONS: list[Option] = options(registry())
OUR_FLAGS = {flag.name: flag for flag in (*FLAGS, *MISSING)}
SAMPLES = {"int": ("7", 7), "float": ("2.5", 2.5), "str": ("words", "words"), "str2bool": ("no", False)}


def sample(flag: dict[str, Any]) -> tuple[list[str], Any]:
    """Arguments after a flag, and the value they should give."""
    if flag["type"] == "flag":
        return [], True
    if "choices" in flag:
        other = next(choice for choice in flag["choices"] if choice != flag["default"])
        return [other], other
    text, value = SAMPLES[flag["type"]]
    return [text], value


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_upstream_flag_parses_with_its_type_or_says_what_is_missing(name: str) -> None:
    values, expected = sample(UPSTREAM[name])
    if name in {flag.name for flag in unavailable(OPTIONS)}:
        with pytest.raises(BadRequest, match=f"^--{name}.*not in this version yet"):
            parse([f"--{name}", *values], OPTIONS)
        return
    assert getattr(parse([f"--{name}", *values], OPTIONS), name) == expected


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_upstream_flag_accepts_its_own_default_spelled_out(name: str) -> None:
    default = UPSTREAM[name]["default"]
    for value in default.values() if isinstance(default, dict) else [default]:
        if value is not None and UPSTREAM[name]["type"] != "flag":
            assert getattr(parse([f"--{name}", str(value)], OPTIONS), name) == value


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_upstream_choice_is_accepted(name: str) -> None:
    if name in {flag.name for flag in unavailable(OPTIONS)}:
        known = OUR_FLAGS[name].choices
        assert set(UPSTREAM[name].get("choices", known)) <= set(known) or not known
        return
    for choice in UPSTREAM[name].get("choices", ()):
        assert getattr(parse([f"--{name}", choice], OPTIONS), name) == choice


@pytest.mark.parametrize("name", [flag.name for flag in MISSING if flag.name in UPSTREAM])
def test_flags_without_code_have_upstreams_default(name: str) -> None:
    assert OUR_FLAGS[name].default in (UPSTREAM[name]["default"], UPSTREAM[name].get("default_used"))
    assert bool(OUR_FLAGS[name].kind is None) == (UPSTREAM[name]["type"] == "flag")


def test_what_is_not_spelled_is_none() -> None:
    spelled = vars(parse([], OPTIONS))
    assert {name for name, value in spelled.items() if value is not None} == set()


@pytest.mark.parametrize(
    "argv",
    [
        ["--offload-model", "False"],
        ["--sample-guide-scale=4"],
        ["--frame-num", "5"],
        ["--no_tf32"],
        ["--t5-cpu"],
        ["--negative-prompt", "dark"],
    ],
)
def test_a_dash_stands_for_any_underscore_and_back(argv: list[str]) -> None:
    parse(argv, OPTIONS)


@pytest.mark.parametrize("o", OPTIONS, ids=lambda o: o.name)
def test_every_switch_has_an_on_and_an_off_spelling(o: Option) -> None:
    if not o.is_switch:
        return
    on = [o.flags[0], "True"] if o.takes_bool else [o.flags[0]]
    assert getattr(parse(on, OPTIONS), o.name) is True
    for off in o.off:
        assert getattr(parse([off], OPTIONS), o.name) is False


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "1", "--base_seed", "2"],
        ["--tf32", "--no-tf32"],
        ["--offload_model", "True", "--no-offload"],
        ["--size", "480p", "--size", "720p"],
        ["--compile", "--no-compile"],
    ],
)
def test_contradictory_spellings_are_refused_naming_both(argv: list[str]) -> None:
    with pytest.raises(BadRequest, match="contradict each other") as refusal:
        parse(argv, OPTIONS)
    assert all(token in str(refusal.value) for token in argv if token.startswith("--"))


def test_equal_spellings_are_no_contradiction() -> None:
    assert parse(["--seed", "3", "--base_seed", "3"], OPTIONS).base_seed == 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "20"], r"unknown flag --steps: did you mean --sample_steps\?"),
        (["--sieze", "1"], r"did you mean --size\?"),
        (["--quux"], "unknown flag --quux: --help lists all"),
        (["--prompt", "a", "red", "ball"], "unexpected 'red'.*quotes"),
        (["--frame_num", "many"], "--frame_num: invalid int value: 'many'"),
        (["--offload_model", "perhaps"], "--offload_model: 'perhaps' is not a boolean"),
        (["--sample_solver", "ddim"], "--sample_solver: invalid choice: 'ddim'"),
        (["--sample_guide_scale", "1,2,3"], "'1,2,3' is not one number, nor two"),
        (["--prompt"], "--prompt: expected one argument"),
        (["--frame", "5"], "unknown flag --frame: did you mean --frame_num"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(argv: list[str], says: str) -> None:
    with pytest.raises(BadRequest, match=says) as refusal:
        parse(argv, OPTIONS)
    assert "\n" not in str(refusal.value)


def test_guidance_takes_one_number_or_one_per_expert() -> None:
    assert parse(["--sample_guide_scale", "5"], OPTIONS).sample_guide_scale == 5.0
    assert parse(["--sample_guide_scale", "3,4"], OPTIONS).sample_guide_scale == (3.0, 4.0)


def test_solvers_offered_are_the_solvers_there_are() -> None:
    from wan.engine.sampling import solvers

    assert set(SOLVERS) == set(solvers.SOLVERS)


def test_an_option_that_arrives_takes_over_a_missing_flag() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Ulysses:
        ulysses_size: int = option(1, "sequence-parallel degree")

    with_it = options_of(Ulysses)
    assert parse(["--ulysses_size", "4"], with_it).ulysses_size == 4
    assert "ulysses_size" not in {flag.name for flag in unavailable(with_it)}


def test_help_names_every_flag_and_its_default() -> None:
    text = build_parser(OPTIONS).format_help()
    for name in (*OUR_FLAGS, *UPSTREAM, *(o.name for o in OPTIONS)):
        assert f"--{name}" in text or any(o.name == name and o.flags[0] in text for o in OPTIONS), name
    for flag in FLAGS:
        if flag.default not in (None, False):
            assert f"(default: {flag.default})" in " ".join(text.split())
    assert max(map(len, text.splitlines())) < 160
