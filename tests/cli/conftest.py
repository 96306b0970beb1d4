"""One process that runs `generate.py` for all the tests that need processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_setup import Driver, frames, listing


@pytest.fixture(scope="session")
def driver(tiny_checkpoint: Path, tiny_task: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    if sys.platform == "win32":
        pytest.skip("signals and processes as POSIX has them")
    started = Driver(tiny_checkpoint, tiny_task, tmp_path_factory.mktemp("driver"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def straight(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is seen in "clip.mp4" and "clip.png" of runs that nothing happens to."""
    folder, made = tmp_path_factory.mktemp("straight"), {}
    for name in ("clip.mp4", "clip.png"):
        ended = driver.run([*driver.argv(video=name.endswith("mp4")), "--save_file", name], folder)
        assert (ended.status, ended.out) == (0, f"{name}\n"), ended.err
        made[name] = frames(folder / name)
    assert listing(folder) == {"clip.mp4", "clip.mp4.json", "clip.png", "clip.png.json"}
    return made
