"""Every fault at every stage: what survives, what the program says, and that following its advice makes the video.

The rows are in fault_table.py, their places in faults.py. Each runs in a process of its own, with real signals. A file
that had the video's name before is there in each row, and a run that fails must leave it alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_table as table
import pytest
from fault_setup import Driver, Result, damage, ffmpeg, frames, linked, listing, processes_in
from fault_table import ROWS, Row

OLD = b"a video that was here before"

# Of a run that makes clip.png; {} is the name of what it makes.
_RUN = ("{}.run/lock", "{}.run/run.json")
_KEPT = (*_RUN, "{}.run/latents-0.safetensors")
LEFT: dict[str, tuple[str, ...]] = {
    table.NOTHING: ("{}",),
    table.RECORD: ("{}", *_RUN),
    table.STATE: ("{}", *_RUN, "{}.run/state.safetensors"),
    table.ASIDE: ("{}", *_RUN, "{}.run/state.safetensors"),
    table.KEPT: ("{}", *_KEPT),
    table.FRAMES: ("{}", *_KEPT, "clip_frames/000001.png"),
    table.WHOLE: ("{}", *_KEPT, "{}.part"),
    table.VIDEO: ("{}", "{}.json"),
    table.VIDEO_AND_LATENTS: ("{}", "{}.json", "clip.latents.safetensors"),
    table.VIDEO_AND_KEPT: ("{}", "{}.json", *_KEPT),
    table.VIDEO_AND_RUN: ("{}", "{}.json", *_KEPT, "{}.run/switch-0.safetensors"),
    table.UNTOLD: ("{}",),
    table.UNTOLD_AND_KEPT: ("{}", *_KEPT),
}


class Case:
    """A row, and the folder it is played in."""

    def __init__(self, row: Row, driver: Driver, place: Path) -> None:
        self.row, self.driver = row, driver
        self.name = "clip.mp4" if row.video else "clip.png"
        self.folder, self.aside, self.tools = place / "work", place / "temporary", place / "tools"
        for folder in (self.folder, self.aside, self.tools):
            folder.mkdir()
        self.clip = self.folder / self.name
        self.clip.write_bytes(OLD)
        self.argv = [*driver.argv(video=row.video), "--save_file", self.name]

    def run(self, argv: list[str], inject: str = "", **env: str) -> Result:
        faults = [fault.strip() for fault in inject.split(";") if fault.strip()]
        return self.driver.run(argv, self.folder, faults, TMPDIR=str(self.aside), **env)

    def struck(self) -> Result:
        """The run that the fault hits."""
        row, env = self.row, {}
        argv = self.argv[:-2] if "--save_file" in row.flags else self.argv
        how, _, what = row.damage.partition(" ")
        if what and ".run" not in what:
            checkpoint = linked(self.driver.checkpoint, self.tools / "checkpoint")
            damage(checkpoint / what, how)
            argv = [*self.driver.argv(video=row.video, checkpoint=checkpoint), "--save_file", self.name]
        if row.stage == table.TEXT:  # or the embeddings of the runs before are found
            env["XDG_CACHE_HOME"] = str(self.tools / "cache")
        if row.ffmpeg:
            env["IMAGEIO_FFMPEG_EXE"] = str(ffmpeg(row.ffmpeg, self.tools))
        ended = self.run([*argv, *row.flags.split()], row.inject, **env)
        if ".run" in what:
            assert ended.status == table.KILLED, ended.err
            damage(self.folder / what, how)
            ended = self.run(["--resume", self.name])
        return ended

    def continued(self, ended: Result) -> Result:
        """What the program advised, word by word."""
        advised = re.search(rf"{self.row.go_on} '([^']+)'|from '([^']+)' with {self.row.go_on}", ended.err)
        if self.row.go_on == table.AGAIN:
            return self.run(self.argv)
        if self.row.status == table.KILLED:
            return self.run(["--resume", self.name])
        if self.row.damage:
            (self.folder / self.row.damage.split()[1]).unlink()
            return self.run(["--resume", self.name])
        assert advised is not None, ended.err
        return self.run([self.row.go_on, advised[1] or advised[2]])

    def left(self) -> set[str]:
        """The files in the folder, each kind of frame once; `kill -9` leaves nobody to remove a .part."""
        found = {name for name in listing(self.folder) if not re.search(r"/00000[2-9]\.png$", name)}
        return {name for name in found if not (self.row.status == table.KILLED and name.endswith(".part"))}

    def expected(self, kept: str) -> set[str]:
        return {name.format(self.name) for name in LEFT[kept]}


def rows() -> Iterator[Any]:
    """All; those of a fault that an earlier stage has met too are left to `make test-slow`."""
    met: set[str] = set()
    for row in ROWS:
        yield pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.fault in met else [])
        met.add(row.fault)


@pytest.mark.parametrize("row", list(rows()))
def test_fault(row: Row, driver: Driver, straight: dict[str, str], tmp_path: Path) -> None:
    case = Case(row, driver, tmp_path)
    ended = case.struck()
    assert ended.status == row.status, ended.err
    assert "Traceback" not in ended.err
    if row.says:
        assert re.search(row.says, ended.last), ended.err
    if row.stage == table.CHECK:
        assert not re.search("^load ", ended.err, re.MULTILINE), "no weight is read before everything is checked"
    assert ended.out == (f"{case.name}\n" if row.status == 0 and not row.damage else ended.out if row.damage else "")
    assert case.left() == case.expected(row.kept), ended.err
    assert no_process_left(tmp_path)

    assert row.kept.startswith("the video") or case.clip.read_bytes() == OLD, "a failed run leaves the old video alone"
    if row.kept == table.WHOLE:
        case.clip.with_name(f"{case.name}.part").rename(case.folder / "whole.png")
        assert frames(case.folder / "whole.png") == straight[case.name]
        (case.folder / "whole.png").unlink()
    if row.kept == table.ASIDE:
        assert [name for name in listing(case.aside) if name.endswith(".latents.safetensors")]
    if row.go_on != table.DONE:
        follow(case, ended, straight)
    else:
        assert frames(case.clip) == straight[case.name]


def follow(case: Case, ended: Result, straight: dict[str, str]) -> None:
    """What the program advised makes the same video, and cleans up."""
    again = case.continued(ended)
    assert again.status == 0, again.err
    made = case.folder / again.out.strip()
    assert frames(made) == straight[case.name]
    if case.row.kept == table.ASIDE:
        return  # the latents went another way: under a new name, and what the run kept stays
    rest = {name for name in case.left() if not name.startswith("clip_frames/")}
    assert made == case.clip and rest == case.expected(table.VIDEO)
    if case.row.kept == table.FRAMES and not case.row.video:
        assert frames(case.folder / "clip_frames" / "000001.png")


def no_process_left(folder: Path) -> bool:
    """An encoder whose program was killed reads the end of its input and goes by itself."""
    for _ in range(100):
        if not processes_in(folder):
            return True
        time.sleep(0.05)
    return False


def test_matrix_is_as_wide_as_promised() -> None:
    assert len(ROWS) >= 60 and {row.stage for row in ROWS} == set(table.STAGES)
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.status for row in ROWS} == {0, 2, 3, 4, table.INT, table.TERM, table.HUP, table.KILLED}
