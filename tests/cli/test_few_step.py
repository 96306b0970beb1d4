"""`--few_step` on the command line: what is told, planned and recorded, and which flags it does not go with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wan.cli.args import parse
from wan.cli.budget import models_for, video_of
from wan.cli.few_step import told_by_name
from wan.cli.generate import main
from wan.cli.presets import make_plan
from wan.cli.request import resolve
from wan.configs import WAN_CONFIGS
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.plan import options
from wan.engine.prediction import predict
from wan.engine.roofline import card_for

LORA = str(Path(__file__).parents[1] / "data" / "lora-tiny.safetensors")
DUMMY = ["--task", "t2v-A14B", "--load_format", "dummy", "--device", "cpu", "--print_plan"]
FEW = ["--few_step", "lightx2v-4step"]
LORAS = ["--lora_high", LORA, "--lora_low", LORA]
CPU = Hardware(device=torch.device("cpu"), name="CPU")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(argv: list[str]) -> Any:
    args = parse([*DUMMY, *argv], options(registry()))
    return args, resolve(args), make_plan(args, registry(), CPU, "none")


def test_the_plan_tells_the_recipe_and_its_forwards_beside_the_plain_ones(capsys: Any) -> None:
    assert main([*DUMMY, *FEW, *LORAS]) == 0
    told = capsys.readouterr().err
    assert (
        "sample  4 steps by lightx2v-4step: 2 of euler with high + 2 of euler with low, guidance 1; 4 forwards in "
        "place of 80, seed" in told
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (FEW, "--few_step lightx2v-4step needs weights that were distilled for it"),
        ([*FEW, *LORAS, "--sample_steps", "8"], "--sample_steps 8 contradicts --few_step lightx2v-4step"),
        ([*FEW, *LORAS, "--sample_solver", "dpm++"], "--sample_solver dpm++ contradicts"),
        ([*FEW, *LORAS, "--sample_guide_scale", "5"], "--sample_guide_scale 5.0 contradicts"),
        ([*FEW, *LORAS, "--sample_shift", "5"], "--sample_shift 5.0 contradicts"),
        ([*FEW, *LORAS, "--cache", "easy"], "have nothing to reuse"),
        (["--few_step", "four"], "--few_step 'four' is unknown: use lightx2v-4step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_exit_code_2(capsys: Any, argv: list[str], said: str) -> None:
    assert main([*DUMMY, *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_shift_acts_where_the_recipe_leaves_it_open(capsys: Any) -> None:
    assert main([*DUMMY, "--few_step", "fusionx-8step", "--lora", LORA, "--sample_shift", "2"]) == 0
    assert "8 of unipc, guidance 1, shift 2; 8 forwards" in capsys.readouterr().err


def test_planned_time_is_that_of_the_forwards_of_the_recipe() -> None:
    """Half of lightx2v-motion's steps are guided: 30 forwards, as 15 guided steps take; 4 steps take 4."""
    seconds = {}
    for name, argv in {
        "motion": ["--few_step", "lightx2v-motion", "--lora_low", LORA],
        "four": [*FEW, *LORAS],
        "plain": ["--sample_steps", "15"],
    }.items():
        _, wanted, plan = planned(argv)
        seconds[name] = predict(models_for(wanted, plan), video_of(wanted, plan), card_for(80 * 10**9), {}).seconds
    assert seconds["motion"]["denoise"] == pytest.approx(seconds["plain"]["denoise"])
    assert seconds["four"]["denoise"] == pytest.approx(seconds["plain"]["denoise"] * 4 / 30)


def test_a_distilled_checkpoint_is_known_by_its_name_and_told_where_from() -> None:
    args = parse(["--ckpt_dir", "/data/Wan2.2-Distill-Models"], options(registry()))
    assert told_by_name(args) == {"few_step_distilled": (True, "the name in --ckpt_dir")}
    assert told_by_name(parse(["--ckpt_dir", "/data/Wan2.2-T2V-A14B"], options(registry()))) == {}


def test_a_video_tells_its_forwards_names_its_recipe_and_repeats_itself(
    tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[phase]]\nsteps = 1\nguidance = 2\n[[phase]]\nsteps = 2\nexpert = "low"\nsolver = "renoise"\n')
    made = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint), "--size", "32x32", "--any_size"]
    made += ["--frame_num", "1", "--seed", "1", "--device", "cpu"]
    assert main([*made, "--few_step", "mine.toml", "--save_file", "one.png"]) == 0
    told = "forwards high 1 uncond + 1 cond, low 2 cond, as planned; 4 in place of the plain 80"
    assert told in capsys.readouterr().err
    record = json.loads(Path("one.png.json").read_text())
    assert record["flags"]["few_step"] == str(recipe)
    assert record["inputs"]["few_step"]["hash"].startswith("sha256:")
    assert record["result"]["plain_forwards"] == 80
    assert main(["--from", "one.png", "--device", "cpu", "--save_file", "two.png"]) == 0
    assert decoded(Path("two.png")) == decoded(Path("one.png"))
    recipe.write_text("[[phase]]\nsteps = 2\n")
    assert main(["--from", "one.png", "--device", "cpu", "--print_plan"]) == 0
    assert "--few_step is another file now" in capsys.readouterr().err


def decoded(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()
