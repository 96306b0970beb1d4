"""A hundred generations in one process: memory stays where it was, and nothing is left behind, failures included."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_setup import Driver, listing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

RUNS = 100


@pytest.fixture
def fresh(tiny_checkpoint: Path, tiny_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A process whose temporary folder is its own, and that nobody else uses."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "driver").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    started = Driver(tiny_checkpoint, tiny_task, tmp_path / "driver")
    yield started
    started.stop()


def is_video(number: int) -> bool:
    return number % 20 == 1


def command(number: int) -> tuple[list[str], int]:
    """Flags of a generation and the status it must end with: sizes, lengths and solvers vary, every tenth fails."""
    flags = ["--size", ("32x32", "48x32", "32x16")[number % 3], "--seed", str(number), "--sample_steps", "4"]
    flags += [
        "--sample_solver",
        ("unipc", "euler", "dpm++")[number % 3],
        "--frame_num",
        "5" if is_video(number) else "1",
    ]
    flags += ["--prompt", f"bird number {number % 7}"]
    if number % 10 == 9:
        return [*flags, "--timeout_s", "1e-9"], 4
    return [*flags, *(["--keep_latents"] if number % 10 == 5 else [])], 0


def test_memory_and_disk_after_a_hundred_generations(fresh: Driver, tmp_path: Path) -> None:
    out = tmp_path / "out"
    resident, open_files = [], []
    for number in range(RUNS):
        flags, status = command(number)
        clip = out / f"{number}.{'mp4' if is_video(number) else 'png'}"
        task = ["--task", "t2v-A14B", "--ckpt_dir", str(fresh.checkpoint), "--any_size", "--device", "cpu"]
        assert fresh.here([*task, *flags, "--save_file", str(clip)]) == status
        if status:
            assert listing(out / f"{clip.name}.run") == {"lock", "run.json", "state.safetensors"}
            assert fresh.here(["--resume", str(clip)]) == 0
        assert listing(out) == {clip.name, f"{clip.name}.json"} | (
            {f"{number}.latents.safetensors", f"switch-{number}.latents.safetensors"}
            if "--keep_latents" in flags
            else set()
        )
        for file in out.iterdir():
            file.unlink()
        resident.append(fresh.status("VmRSS"))
        open_files.append(len(os.listdir(f"/proc/{fresh.pid}/fd")))
    early, late = statistics.mean(resident[20:40]), statistics.mean(resident[-20:])
    assert late <= 1.01 * early, f"resident memory went from {early:.0f} to {late:.0f} KiB"
    assert open_files[-1] <= open_files[20]
    assert not listing(tmp_path / "temporary")
    assert not Path(f"/proc/{fresh.pid}/task/{fresh.pid}/children").read_text()
