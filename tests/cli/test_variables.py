"""Environment variables stand for flags in generate_optimized.py: taken, told, beaten by flags, refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from wan.cli.generate import main
from wan.cli.variables import VARIABLES

PLAN = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu", "--print_plan"]
NAMES = [name for variable in VARIABLES for name in variable.names]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`program(variables, *flags)`: exit status and standard error of generate_optimized.py."""

    def run(variables: dict[str, str], *flags: str, reads: bool = True) -> tuple[int, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        status = main([*PLAN, *flags], default_preset="auto", variables=reads)
        return status, capsys.readouterr().err

    return run


def test_every_variable_is_taken_and_told(program: Any) -> None:
    variables = {"MAX_STEPS": "20", "WIDTH": "480", "HEIGHT": "832", "FRAME_RATE": "8", "MAX_FRAMES": "120"}
    status, err = program(variables)
    assert status == 0
    for line in (
        "note: MAX_STEPS=20 in the environment is taken as --sample_steps 20",
        "note: WIDTH=480 HEIGHT=832 in the environment is taken as --size 480*832",
        "note: FRAME_RATE=8 in the environment is taken as --fps 8",
        "note: MAX_FRAMES=120 in the environment is taken as --frame_num 117",
        "video   480x832 (--size 480*832), 117 frames (--frame_num) at 8 fps = 14.6 s",
        "sample  20 steps of",
    ):
        assert line in err, line
    assert program({}, reads=False)[1].count("environment") == 0, "generate.py reads none"


def test_what_overlaps_is_what_the_flags_make(program: Any) -> None:
    """Windows of a video here; the clips of a task that has clips, and of --extend, likewise."""
    status, err = program({"MOTION_FRAME": "8"}, "--context_frames", "81")
    assert status == 0 and "MOTION_FRAME=8 in the environment is taken as --context_overlap 8" in err
    assert re.search(r"context_overlap +8 +MOTION_FRAME=8 in the environment", err)


def test_compile_is_switched_by_its_variable(program: Any) -> None:
    assert "compile=True (WAN_TORCH_COMPILE=1 in the environment)" in program({"WAN_TORCH_COMPILE": "1"})[1]


def test_a_flag_wins_also_one_that_says_the_same_otherwise(program: Any) -> None:
    variables = {"MAX_STEPS": "20", "MAX_FRAMES": "33", "WAN_TORCH_COMPILE": "true"}
    status, err = program(variables, "--sample_steps", "4", "--duration", "1", "--no-compile")
    assert status == 0 and "sample  4 steps" in err and "17 frames (--duration 1" in err
    for flag in ("sample_steps", "duration", "compile"):
        assert f"is not used: --{flag} says it" in err


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MAX_STEPS": "many"}, "MAX_STEPS='many' in the environment: give a whole number above 0"),
        ({"MAX_STEPS": "0"}, "MAX_STEPS='0' in the environment"),
        ({"FRAME_RATE": "16.5"}, "FRAME_RATE='16.5' in the environment"),
        ({"MAX_FRAMES": "-3"}, "MAX_FRAMES='-3' in the environment"),
        ({"WIDTH": "832"}, "WIDTH is set in the environment and HEIGHT is not: set both, or use --size"),
        ({"HEIGHT": "832"}, "HEIGHT is set in the environment and WIDTH is not"),
        ({"WIDTH": "a", "HEIGHT": "1"}, "WIDTH='a' HEIGHT='1' in the environment"),
        (
            {"WIDTH": "1000", "HEIGHT": "600"},
            r"--size .1000\*600.*; --size is WIDTH=1000 HEIGHT=600 in the environment",
        ),
        (
            {"WAN_LORA_STREAMING": "1", "WAN_LORA_ONTHEFLY": "true"},
            "WAN_LORA_STREAMING=1 in the environment and WAN_LORA_ONTHEFLY=true in the environment contradict",
        ),
        ({"WAN_TORCH_COMPILE": "perhaps"}, "WAN_TORCH_COMPILE='perhaps' in the environment: give True or False"),
        ({"MOTION_FRAME": "9"}, "--refert_num: t2v-1.3B has no use for it.*; --refert_num is MOTION_FRAME=9 in the"),
    ],
    ids=lambda value: " ".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_be_is_refused_naming_the_variable(
    variables: dict[str, str], says: str, program: Any
) -> None:
    status, err = program(variables)
    assert status == 2 and re.search(f"error: .*{says}", err), err


def test_a_recorded_run_says_everything_itself(program: Any) -> None:
    """The run does not exist here, so only what is said before it is looked for counts."""
    status, err = program({"MAX_STEPS": "20"}, "--resume", "gone.mp4.run")
    assert status == 2 and "MAX_STEPS=20 in the environment is not used: --resume says it" in err
