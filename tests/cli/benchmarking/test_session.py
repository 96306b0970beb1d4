"""A benchmark goes on past what fails, goes on after a crash, and tells what it measured in files that say the same."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from wan.cli import benchmark
from wan.cli.benchmarking import session
from wan.cli.benchmarking.session import run
from wan.cli.signals import Stopped
from wan.engine.errors import BadRequest, GenerationFailed

MATRIX = """
num_runs = 2
[flags]
task = "t2v-A14B"
load_format = "dummy"
size = "64*48"
any_size = true
sample_steps = 2
[matrix]
frame_num = [5, 9]
[variants.baseline]
baseline = true
[variants.optimized]
preset = "none"
"""


def go(words: list[str], start: Any) -> int:
    return run(words, benchmark.build_parser(), start)


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(next(folder.glob("benchmark_*.json")).read_text("utf-8"))
    return content


class Page(HTMLParser):
    """Fails on tags that do not match, and keeps the text and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []
        self.pictures: list[bytes] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            source = dict(attributes)["src"] or ""
            self.pictures.append(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True))
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag == "rect"

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_a_failed_row_is_marked_and_the_others_go_on(
    scripted: Any, matrix_file: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    """The cell's other variant runs on; JSON, CSV and page hold the same rows and the reason."""
    broken = GenerationFailed("out of memory: <3 GiB> were asked for")
    start, log = scripted(baseline=[9.0, 2.0, 4.0, 9.0], optimized=[5.0, broken])
    words = ["--matrix", str(matrix_file(MATRIX)), "--output_dir", str(tmp_path), "--price_per_hour", "3.6"]
    assert go(words, start) == 0
    assert log == ["baseline", "optimized", "baseline", "optimized", "baseline"] * 2  # in turns, until one fails

    content = results(tmp_path)
    assert content["command"].startswith("python benchmark_t2v.py --matrix") and content["commit"] and content["torch"]
    rows = content["rows"]
    assert [(row["frames"], row["variant"], row["status"]) for row in rows] == [
        (frames, variant, status)
        for frames in (5, 9)
        for variant, status in (("baseline", "ok"), ("optimized", "failed"))
    ]
    first, failed = rows[:2]
    assert first["all_s"] == [2.0, 4.0] and first["total_s"] == 3.0  # the warm-up of 9 s is not among them
    assert first["dollars"] == pytest.approx(3.0 / 1000)
    # Four forwards of 1 GFLOP in 2.4 s, of a machine that was measured to do 500 in one.
    assert first["mfu"] == pytest.approx(4 * 1e-3 / 2.4 / 0.5)
    assert first["power_w"] is None and first["not_measured"]["power_w"] == "no card here"
    assert failed["reason"] == str(broken) and failed["total_s"] is None

    with next(tmp_path.glob("*.csv")).open(newline="", encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(io.StringIO(file.read()))] == [row["status"] for row in rows]
    page = Page(next(tmp_path.glob("*.html")).read_text("utf-8"))
    text = " ".join(page.said)
    assert text.count(f"failed: {broken}") == 2 and "64x48, 9 frames" in text and "power_w" in text
    assert len(page.pictures) == 2 and all(picture.startswith(b"\x89PNG") for picture in page.pictures)
    assert "failed: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM\n"),
        (BadRequest("no such thing"), 2, "error: no such thing\n"),
        (SystemExit(0), 0, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_ends_it_is_told_in_a_line_with_its_own_status(
    raised: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(session, "run", Mock(side_effect=raised))
    assert benchmark.main([]) == status
    assert capsys.readouterr().err == said


def test_resume_runs_only_what_is_not_written(
    scripted: Any, matrix_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """The machine dies in the second cell; the rest is made by the same command line, and the first cell is kept."""
    words = ["--matrix", str(matrix_file(MATRIX)), "--output_dir", str(tmp_path), "--num_runs", "1", "--warmup", "0"]
    start, log = scripted(baseline=[1.0], optimized=[0.5])
    started = []

    def dying(variant: Any, *rest: Any) -> Any:
        started.append(variant.name)
        if len(started) > 2:
            raise KeyboardInterrupt
        return start(variant, *rest)

    with pytest.raises(KeyboardInterrupt):
        go(words, dying)
    before = results(tmp_path)["rows"]
    assert [row["frames"] for row in before] == [5, 5]
    log.clear()
    assert go(["--resume", str(next(tmp_path.glob("benchmark_*.json")))], start) == 0
    assert log == ["baseline", "optimized"]
    content = results(tmp_path)
    assert content["rows"][:2] == before and [row["frames"] for row in content["rows"]] == [5, 5, 9, 9]


def test_without_a_matrix_a_failure_is_the_exit_status(scripted: Any, tmp_path: Path) -> None:
    start, _ = scripted(baseline=[1.0, 1.0], optimized=[GenerationFailed("it broke")])
    words = ["--task", "t2v-1.3B", "--load_format", "dummy", "--size", "480p", "--num_runs", "1", "--output_dir"]
    with pytest.raises(GenerationFailed, match="optimized: it broke"):
        go([*words, str(tmp_path)], start)


def test_the_original_code_is_a_row_and_its_stages_are_told(
    scripted: Any, tiny_checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    """A velocity of 1 against 1.25 is off by a fifth of theirs; texts, latents and frames are equal."""
    (tmp_path / "clone" / "wan").mkdir(parents=True)
    (tmp_path / "clone" / "wan" / "__init__.py").touch()
    start, log = scripted(baseline=[1.0, 1.0], upstream=[2.0, 2.0])
    words = f"--task t2v-A14B --ckpt_dir {tiny_checkpoint} --size 64x48 --any_size --frame_num 5 --mode baseline"
    assert go([*words.split(), "--num_runs", "1", "--upstream", str(tmp_path / "clone")], start) == 0
    assert log == ["baseline", "upstream"] * 2
    out = capsys.readouterr().out
    assert "upstream, text, cond: 0.0e+00 relative" in out
    assert "upstream, first velocity: 2.0e-01 relative, at most 2.50e-01 from baseline" in out
    assert "upstream, frames, of 255: 0.0e+00 relative" in out
    assert "baseline is 2.00x as fast as upstream" in out


def test_blocked_variants_run_one_after_the_other(scripted: Any) -> None:
    start, log = scripted(baseline=[1.0, 1.0], optimized=[1.0, 1.0])
    words = "--task t2v-1.3B --load_format dummy --size 480p --num_runs 2 --warmup 0 --blocked"
    assert go(words.split(), start) == 0
    assert log == ["baseline", "baseline", "optimized", "optimized"]


def test_compare_tells_faster_slower_and_noise_apart(
    scripted: Any, matrix_file: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    """Old: 1.0 +-10 % and 1.0 +-1 %. New: 1.05 (inside the band), then 0.5 (twice as fast), then 1.3 (slower)."""
    path = matrix_file(re.sub(r"\[5, 9\]", "[5]", MATRIX))
    words = ["--matrix", str(path), "--num_runs", "3", "--warmup", "0", "--output_dir"]
    start, _ = scripted(baseline=[0.95, 1.0, 1.05], optimized=[0.995, 1.0, 1.005])
    go([*words, str(tmp_path / "old")], start)
    old = ["--compare", str(next((tmp_path / "old").glob("*.json")))]
    start, _ = scripted(baseline=[1.05, 1.05, 1.05], optimized=[0.5, 0.5, 0.5])
    go([*words, str(tmp_path / "new"), *old], start)
    out = capsys.readouterr().out
    assert "| baseline | 1 | 1.05 | 1.050 | +-10.0 % | the same within noise |" in out
    assert "| optimized | 1 | 0.5 | 0.500 | +-1.0 % | 2.00x as fast |" in out
    start, _ = scripted(baseline=[1.0, 1.0, 1.0], optimized=[1.3, 1.3, 1.3])
    go([*words, str(tmp_path / "newer"), *old], start)
    assert "1.300 | +-1.0 % | SLOWER by 30.0 % |" in capsys.readouterr().out


def test_published_rows_of_before_can_be_compared_with(scripted: Any, root: Path, capsys: Any) -> None:
    """Another machine is said to be one instead of being called faster."""
    words = f"--mode baseline --num_runs 1 --compare {root}/docs/benchmarks/t2v-demo_cpu.json".split()
    start, _ = scripted(baseline=[1.0, 1.0])
    assert go(words, start) == 0
    assert "| against t2v-demo_cpu.json |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[flags]\nsample_stepz = 4", "sample_stepz"),
        ("[matrix]\nframe_num = 5", "frame_num"),
        ("[variants.fast]\ncompil = true", "compil"),
        ("[variants.fast]\nrunner = 'theirs'", "theirs"),
        ("[variants.fast]\nbaseline = true\ncompile = true", "compile"),
        ("[variants.fast]\ncompile_mode = 'quick'", "quick"),
        ("[flags]\nframe_num = 6\ntask = 't2v-1.3B'\nload_format = 'dummy'", "6"),
        ("[flags]\nframe_num = 5\n[matrix]\nframe_num = [5]", "frame_num"),
        ("num_runs = '3'", "num_runs"),
        ("runs = 3", "runs"),
        ("[pictures]\nimagine = '64*64'", "imagine"),
        ("[flags", "cannot be read"),
    ],
)
def test_a_bad_matrix_exits_with_2_and_names_the_key(
    text: str, named: str, matrix_file: Callable[[str], Path], capsys: Any
) -> None:
    assert benchmark.main(["--matrix", str(matrix_file(text))]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--num_runs 0", "--num_runs 0"),
        ("--matrix nosuch", "ladder-1.3b"),
        ("--mode matrix", "--matrix"),
        ("--mode both --matrix demo", "--mode both"),
        ("--compare nosuch.json", "nosuch.json"),
        ("--resume nosuch.json", "nosuch.json"),
        ("--noise_file nosuch.npy", "nosuch.npy"),
        ("--upstream nosuch", "wan/__init__.py"),
        ("--compare diffusers --task t2v-1.3B --load_format dummy --size 480p", "checkpoint"),
        ("--num_runs many", "--num_runs"),
        ("--price_per_hour 0", "--price_per_hour"),
        ("--threads 0", "--threads"),
    ],
)
def test_bad_words_exit_with_2_and_are_named(words: str, named: str, capsys: Any) -> None:
    assert benchmark.main(words.split()) == 2
    assert named in capsys.readouterr().err
