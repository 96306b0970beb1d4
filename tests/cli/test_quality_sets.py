"""`--quality`: a set lies between preset and flags, exact lets nothing lossy in, and a loss nobody measured is said."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from wan.cli import quality_sets
from wan.cli.args import parse
from wan.cli.benchmark import build_parser
from wan.cli.generate import main
from wan.cli.presets import plan_and_preset
from wan.engine.errors import IncompatibleOptions
from wan.engine.hardware import probe
from wan.engine.optimizations import registry
from wan.engine.plan import Plan, options

DUMMY = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu", "--print_plan"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*words: str, preset: str = "none") -> Plan:
    args = parse(words, options(registry()))
    return plan_and_preset(args, registry(), probe("cpu"), preset)[0]


@pytest.mark.parametrize("name", quality_sets.SETS)
def test_a_set_is_what_its_file_says_and_works_anywhere(name: str) -> None:
    said, values = quality_sets.read_set(name), plan("--quality", name).values()
    assert said.items() <= values.items()
    assert name == "exact" or any(o.grade == "lossy" for o in plan("--quality", name).enabled())
    assert all(o.grade != "lossy" for o in plan("--quality", "exact").enabled())


def test_flags_win_and_the_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan("--quality", "fast", "--cache", "off")
    assert made.values()["cache"] == "off" and made.reasons["cache"] == "flag"
    assert made.reasons["use_batched_cfg"] == "--quality fast"
    assert main([*DUMMY, "--quality", "fast"]) == 0
    assert re.search(r"^ *cache +easy +--quality fast", capsys.readouterr().err, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quality", "exact", "--cache", "easy"], "--quality exact and --cache do not go together"),
        (["--quality", "exact", "--preset", "mine.toml"], "--quality exact and --cache do not go together"),
        (["--quality", "fast", "--from", "clip.mp4"], "--quality fast: --from has its options already"),
        (["--quality", "best"], "--quality: invalid choice: 'best'"),
    ],
)
def test_what_contradicts_a_set_is_refused_in_one_line(words: list[str], said: str, capsys: Any) -> None:
    Path("mine.toml").write_text('cache = "easy"  # mine\n', encoding="utf-8")
    assert main([*DUMMY, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(said, lines[0]), lines


def test_a_shipped_preset_gives_way_to_exact_and_its_planner_chooses_nothing_lossy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "card.toml").write_text("vae_tiling = true\nffn_rows = 64\n", encoding="utf-8")
    monkeypatch.setattr("wan.cli.presets.folder", lambda name: tmp_path / "configs")
    args = parse(["--quality", "exact", "--preset", "card"], options(registry()))
    made, preset = plan_and_preset(args, registry(), probe("cpu"), "none")
    assert not made.values()["vae_tiling"] and made.values()["ffn_rows"] == 64
    assert preset is not None and preset.left_out == ("vae_tiling: --quality exact has nothing that is lossy",)
    assert all(kind.grade != "lossy" for kind in quality_sets.may_use(args, registry()))


def test_conflicts_name_both_sides_also_where_nobody_spelled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_sets, "read_set", lambda name: {"apg": True})
    with pytest.raises(
        IncompatibleOptions, match=r"--fresca and --apg .*--quality fast chooses apg = True; a flag wins"
    ):
        plan("--quality", "fast", "--fresca")
    assert plan("--quality", "fast", "--fresca", "--no-apg").values()["fresca"]


def test_another_checkpoint_is_told_that_its_loss_is_not_known_and_how_to_measure_it(capsys: Any) -> None:
    assert main([*DUMMY, "--quality", "balanced"]) == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if "loss not measured" in line)
    own, rest = build_parser().parse_known_args(shlex.split(said.partition("benchmark_t2v.py ")[2]))
    assert (own.mode, own.cases) == ("quality", "balanced")
    assert parse(rest, options(registry())).task == "t2v-1.3B"
    assert main(["--task", "t2v-demo", "--print_plan", "--quality", "balanced"]) == 0
    assert "loss not measured" not in capsys.readouterr().err
