"""wok/: the four rungs run, say what became of them and keep a row; launchers exist for every card and parse."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from wan.cli.args import memory, parse
from wan.cli.cards import CARDS
from wan.engine.optimizations import registry
from wan.engine.placement import DeviceMover, Placement
from wan.engine.plan import options

RUNGS = {
    "test1_baseline": "text_encoder enters, high enters, low enters, vae enters",
    "test2_vae_cpu": "text_encoder enters, high enters, low enters, vae enters, vae leaves",
    "test3_t5_cpu": "high enters, low enters, vae enters",
    "test4_both": "high enters, high leaves, low enters, low leaves, vae enters, vae leaves",
}

Started = Callable[..., list[str]]
Climb = Callable[..., tuple[int, str]]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")


@pytest.fixture
def started(tmp_path: Path, root: Path) -> Started:
    """What a script of wok/ starts Python with, when it is called from another folder."""
    python, away = tmp_path / "python", tmp_path / "away"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    away.mkdir()

    def start(script: str, *argv: str, **environment: str) -> list[str]:
        ran = subprocess.run(
            [str(root / "wok" / script), *argv], cwd=away, text=True, capture_output=True, check=True, input="a cat\n",
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), **environment},
        )  # fmt: skip
        return ran.stdout.splitlines()

    return start


@pytest.fixture
def climb(
    started: Started,
    root: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Climb:
    """Runs a rung on the tiny model; gives the exit status and the table."""
    from wan.configs import WAN_CONFIGS

    tool, table = load(root / "tools" / "measure_run.py"), tmp_path / "table.md"
    table.write_text((root / "wok" / "README.md").read_text("utf-8"), encoding="utf-8")
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    sizes = {"TASK": "t2v-A14B", "SIZE": "32*32", "FRAMES": "5", "STEPS": "4", "CKPT": str(tiny_checkpoint)}

    def run(rung: str, **environment: str) -> tuple[int, str]:
        script, *argv = started(f"{rung}.sh", "--any_size", **sizes, **environment)
        assert script == "tools/measure_run.py"
        for flag, path in (("--table", table), ("--save_file", tmp_path / f"{rung}.mp4")):
            argv[argv.index(flag) + 1] = str(path)
        status = tool.main(argv)
        return status, table.read_text("utf-8")

    return run


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_rung_moves_what_its_flags_promise_and_keeps_one_row(
    climb: Climb, capsys: pytest.CaptureFixture[str]
) -> None:
    for rung in (*RUNGS, "test1_baseline"):
        status, table = climb(rung)
        said = capsys.readouterr().err
        assert status == 0, said
        assert f"moves   {RUNGS[rung]}\n" in said
        assert "memory: not measured; computed " in said
    rows = [line for line in table.splitlines() if line.startswith("| test") and " | ok | " in line]
    assert [row.split()[1] for row in rows] == list(RUNGS)


def test_running_out_of_memory_is_an_outcome_with_what_to_try(climb: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DeviceMover, name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeviceMover, "to_device", full)
    status, table = climb("test4_both")
    assert status == 4
    assert " | out of memory during 'load high': try " in table and "fewer --frame_num | " in table


def test_networks_that_move_otherwise_are_told(
    climb: Climb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Placement, "set_policy", lambda *_: None)
    assert climb("test4_both")[0] == 1
    assert f"promise other moves: {RUNGS['test4_both']}" in capsys.readouterr().err


def test_a_limit_needs_a_gpu_and_leaves_no_row(climb: Climb, capsys: pytest.CaptureFixture[str]) -> None:
    status, table = climb("test1_baseline", VRAM_LIMIT="12GB", CUDA_VISIBLE_DEVICES="")
    assert status == 2 and "| test1_baseline |" not in table
    assert "--vram_limit 12.0 GB: there is no GPU here" in capsys.readouterr().err


def test_every_card_has_launchers_that_parse(started: Started, root: Path, tmp_path: Path) -> None:
    for card in CARDS:
        script, *argv = started(f"launch_{card.preset}.sh", CKPT="../away")
        args = parse(argv, options(registry()))
        assert script == "generate_optimized.py"
        assert (args.preset, args.prompt, args.ckpt_dir) == (card.preset, "a cat", str(tmp_path / "away"))
        assert 0.9 <= args.vram_budget / card.memory <= 1.1
        windows = (root / "wok" / f"launch_{card.preset}.bat").read_text("utf-8")
        vram = re.search(r'"VRAM=(\w+)"', windows)
        assert f'"CARD={card.preset}"' in windows
        assert vram is not None and memory(vram[1]) == args.vram_budget
