"""Shipped matrices are requests that this version can make, and what is spelled on the command line wins over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan.cli import benchmark
from wan.cli.benchmarking import session
from wan.cli.benchmarking.matrix import Cell, find_matrix
from wan.cli.benchmarking.noise import Start, read_noise
from wan.engine.errors import BadRequest


def planned(words: str) -> list[Cell]:
    own, rest = benchmark.build_parser().parse_known_args(words.split())
    return session.plan(own, rest)[0]


SHIPPED = {
    "h100-a14b": [("t2v-A14B", "1280x720", 81, 40)],
    "rtx5090-i2v": [("i2v-A14B", "832x1216", frames, 4) for frames in (25, 49, 81, 161)],
    "i2v-512": [("i2v-A14B", "512x512", 117, 4)],
    "vace-r2v": [("vace-1.3B", "832x480", 81, 10), ("vace-14B", "832x480", 81, 10)],
    "ladder-1.3b": [("t2v-1.3B", "832x480", 81, 10)],
    "mlperf-v6": [("t2v-A14B", "1280x720", 81, 20)],
    "demo": [("t2v-demo", "96x96", frames, 8) for frames in (17, 33)],
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_matrix_asks_for_what_its_name_says(name: str, tmp_path: Path) -> None:
    """Every cell and variant passes all checks that come before weights; inputs that it needs are drawn."""
    own, rest = benchmark.build_parser().parse_known_args(["--matrix", name, "--output_dir", str(tmp_path)])
    cells, schedule = session.plan(own, rest)
    wanted = [session.check(cell, own) for cell in cells]
    assert [(w.task, f"{w.width}x{w.height}", w.num_frames, w.steps) for w in wanted] == SHIPPED[name]
    assert schedule.num_runs >= 1 and all(len(cell.variants) >= 2 for cell in cells)
    if name == "mlperf-v6":
        assert wanted[0].guide_scale == (3.0, 4.0) and wanted[0].seed == 42  # low noise, high noise


def test_every_shipped_matrix_is_tested() -> None:
    assert {path.stem for path in find_matrix("demo").parent.glob("*.toml")} == set(SHIPPED)


def test_the_command_line_wins_over_the_file(matrix_file: Callable[[str], Path]) -> None:
    """An axis that is spelled is one value; so is a variant's flag."""
    path = matrix_file(
        "num_runs = 7\n[flags]\ntask = 't2v-1.3B'\nload_format = 'dummy'\n[matrix]\nsize = ['832*480', '480*832']\n"
        "frame_num = [5, 9]\n[variants.fast]\npreset = 'auto'\noffload_model = false\nvae_tiling = true\n"
    )
    cells = planned(f"--matrix {path}")
    assert [cell.name for cell in cells] == [
        "832*480 5 frames", "832*480 9 frames", "480*832 5 frames", "480*832 9 frames",
    ]  # fmt: skip
    assert cells[0].variants[0].words == ("--preset=auto", "--offload_model=False", "--vae_tiling")
    cells = planned(f"--matrix {path} --frame_num 13 --preset none")
    assert [cell.name for cell in cells] == ["832*480", "480*832"]
    assert cells[0].variants[0].words == ("--offload_model=False", "--vae_tiling")
    own, rest = benchmark.build_parser().parse_known_args(["--matrix", str(path)])
    assert session.plan(own, rest)[1].num_runs == 7


@pytest.mark.parametrize("ending", [".npy", ".pt", ".safetensors"])
def test_noise_of_a_file_replaces_what_was_drawn(ending: str, tmp_path: Path) -> None:
    noise, path = torch.randn(16, 2, 4, 6), tmp_path / f"noise{ending}"
    if ending == ".npy":
        np.save(path, noise.numpy())
    elif ending == ".pt":
        torch.save(noise, path)
    else:
        from safetensors.torch import save_file

        save_file({"latents": noise}, path)

    run: Any = type("Run", (), {"latents": torch.zeros(1, 16, 2, 4, 6), "shot": type("Shot", (), {"known": None})})()
    start = Start(read_noise(path))
    start.restore(run)
    assert torch.equal(run.latents, noise[None]) and start.latents is run.latents
    run.latents = torch.zeros(1, 16, 3, 4, 6)
    with pytest.raises(BadRequest, match=r"\(16, 2, 4, 6\).*\(16, 3, 4, 6\)"):
        start.restore(run)


def test_a_file_that_holds_no_latents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.npy"
    np.save(path, np.zeros((4, 4)))
    with pytest.raises(BadRequest, match=r"noise.npy.*\(4, 4\)"):
        read_noise(path)
