"""Names of videos: what fields become, that every system takes them whatever the prompt, that none is overwritten."""

from __future__ import annotations

import itertools
import random
import re
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wan
from wan.cli.generate import main
from wan.cli.naming import (
    FIELDS,
    MAX_BYTES,
    TEXT,
    Claims,
    Pattern,
    default_paths,
    numbered,
    pattern_paths,
    resolution,
    run_folder,
    values,
)  # fmt: skip
from wan.cli.request import Wanted
from wan.configs import WAN_CONFIGS
from wan.engine.errors import OutputError
from wan.video import default_file_name, verify_video

WHEN = time.struct_time((2025, 7, 28, 9, 5, 3, 0, 209, 0))
WANTED = Wanted(
    task="t2v-A14B", config=WAN_CONFIGS["t2v-A14B"], checkpoint=None, prompt="Two cats box, on a stage", n_prompt="",
    width=1280, height=720, num_frames=81, fps=16, steps=40, shift=12.0, solver="dpm++", guide_scale=(3.0, 4.0),
    seed=42,
)  # fmt: skip

NASTY = [
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\system32",
    "CON",
    "nul.mp4",
    "com1 is a port",
    "LPT¹",
    "AUX.",
    "a video.mp4.",
    "trailing dots...",
    "trailing spaces   ",
    "-rf",
    "--help",
    "~/home",
    "$HOME `ls` $(rm -rf) ; & | > out < in",
    "quotes \" and ' and `",
    "percent %05d %s",
    "{seed} {0} {{}} {prompt:40}",
    "line\nbreak\r\nand\ttab\x00nul\x1b[31m",
    "two\u2028separators\u2029and\x85one",
    "right \u202eto left\u202c \u200f\u061c marks \u2066isolated\u2069",
    "zero\u200bwidth\ufeff joined\u200d \u00ad",
    "\u202e\u200b\u200d",
    "👩‍👩‍👧‍👦 a family 🏳️‍🌈" * 20,
    "😀" * 300,
    "一只红色的狐狸在雪地里奔跑" * 30,
    "हिन्दी में एक लंबा वाक्य " * 20,
    "e\u0301" * 200,
    "\u1112\u1161\u11ab" * 200,
    "a\u0300\u0301\u0302" * 100,
    "lone \ud800 surrogate",
    "private \ue000 use",
    "x" * 5000,
    "." * 400,
    " ." * 400,
    "/" * 400,
    "_" * 400,
    "COM1" * 100,
]
PATTERNS = [
    "{prompt}",
    "{prompt:400}",
    "{prompt:1}",
    "{prompt:400}/{prompt:400}_{seed}",
    "{task}_{size}_{seed}_{prompt:40}",
    "{date}/{prompt:300}{image}{prompt:300}_{seed}",
    "{prompt:999}_{index}.mov",
]
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
DEVICES |= {f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"}


def check_everywhere(name: str) -> None:
    """`name` is a file or folder on Windows, macOS and Linux, and looks like what it is."""
    assert name and not set(name) & set('<>:"/\\|?*'), name
    assert {unicodedata.category(char) for char in name}.isdisjoint({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}), ascii(name)
    assert len(f"{name}-99999.part".encode()) <= 255 and name == unicodedata.normalize("NFC", name)
    assert not name.startswith(("-", ".", " ", "~")) and not name.endswith((".", " ")), name
    assert name.split(".")[0].strip().upper() not in DEVICES, name


def named(pattern: str, wanted: Wanted = WANTED, ending: str = ".mp4") -> str:
    return next(pattern_paths(Pattern(pattern), wanted, ending, WHEN)).as_posix()


# Any text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", NASTY, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_prompt_gives_names_every_system_takes(pattern: str, prompt: str, tmp_path: Path) -> None:
    path = next(pattern_paths(Pattern(pattern), replace(WANTED, prompt=prompt), ".mp4", WHEN))
    assert not path.is_absolute() and len(path.parts) == pattern.count("/") + 1, "a prompt makes no folder"
    for part in path.parts:
        check_everywhere(part)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"")


def test_random_text_gives_names_every_system_takes() -> None:
    pieces = [*"abz /\\.:-_~{}\n\u202e\u200d\u00e9e\u0301😀漢\ud83d\x7f", "CON", "nul", "..", "   "]
    draw = random.Random(3)
    for _ in range(300):
        prompt = "".join(draw.choices(pieces, k=draw.randrange(200)))
        for pattern in PATTERNS:
            path = next(pattern_paths(Pattern(pattern), replace(WANTED, prompt=prompt), ".png", WHEN))
            for part in path.parts:
                check_everywhere(part)


@pytest.mark.parametrize("prompt", NASTY, ids=lambda text: ascii(text[:20]))
def test_the_default_name_keeps_its_time_whatever_the_prompt(prompt: str) -> None:
    names = default_paths(replace(WANTED, prompt=prompt), ".mp4", WHEN)
    for name, end in zip(names, (".mp4", "-2.mp4", "-3.mp4"), strict=False):
        check_everywhere(name.name)
        assert name.name.startswith("t2v-A14B_1280x720_1_") and name.name.endswith(f"_20250728_090503{end}")


def test_the_default_name_is_upstreams() -> None:
    assert next(default_paths(WANTED, ".mp4", WHEN)).name == default_file_name(
        "t2v-A14B", "1280*720", 1, WANTED.prompt, when=WHEN
    )
    one = replace(WANTED, task="t2v-1.3B", config=WAN_CONFIGS["t2v-1.3B"], prompt="a b/c", width=832, height=480)
    assert next(default_paths(one, ".mp4", WHEN)).name == "t2v-1.3B_832x480_1_1_a_b_c_20250728_090503.mp4"


def test_a_long_prompt_gives_way_to_what_follows() -> None:
    name = named("{prompt:400}_{seed}_{steps}", replace(WANTED, prompt="漢" * 400))
    assert name.endswith("_42_40.mp4") and MAX_BYTES - 3 < len(name.removesuffix(".mp4").encode()) <= MAX_BYTES
    both = named("{image}{prompt:400}{task}", replace(WANTED, prompt="y" * 400))
    assert both == "y" * (MAX_BYTES - 8) + "t2v-A14B.mp4"


# Fields ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{task}_{size}_{seed}_{prompt:40}", "t2v-A14B_1280x720_42_Two_cats_box,_on_a_stage.mp4"),
        ("{width}x{height}_{resolution}", "1280x720_720p.mp4"),
        ("{frames}f_{duration}s_{fps}fps", "81f_5.1s_16fps.mp4"),
        ("{steps}_{shift}_{guidance}_{solver}", "40_12_3-4_dpm++.mp4"),
        ("{date}/{time}-{prompt:8}", "20250728/090503-Two_cats.mp4"),
        ("{seed:6}_{index:4}", "000042_0001.mp4"),
        ("{task:3}", "t2v.mp4"),
        ("{image}_{seed}", "_42.mp4"),
        ("{image}{seed}", "42.mp4"),
        ("v1.5_{seed}", "v1.5_42.mp4"),
        ("{seed}.mov", "42.mov"),
        ("{seed}.MKV", "42.mkv"),
        ("{{{seed}}}", "{42}.mp4"),
        ("a\\b", "a_b.mp4"),
        ("./a//b", "a/b.mp4"),
        ("plain name", "plain name.mp4"),
        ("{date}.{time}", "20250728.090503.mp4"),
    ],
)
def test_fields_become_what_is_made(pattern: str, name: str) -> None:
    assert named(pattern) == name


def test_every_field_has_a_value_and_the_example_is_true() -> None:
    known = values(replace(WANTED, prompt="Two cats box", solver="unipc"), WHEN)
    assert list(known) == [field.name for field in FIELDS]
    for field in FIELDS:
        rendered = named(f"x{{{field.name}}}", replace(WANTED, prompt="Two cats box", solver="unipc"))
        assert rendered == f"x{field.example}.mp4", field.name


@pytest.mark.parametrize(
    ("size", "name"),
    [((832, 480), "480p"), ((480, 832), "480p"), ((1280, 704), "720p"), ((96, 96), "96p"), ((1024, 1024), "1024p")],
)
def test_resolution_is_called_as_people_call_it(size: tuple[int, int], name: str) -> None:
    assert resolution(*size) == name


def test_one_guidance_scale_is_one_number() -> None:
    assert [named("{guidance}", replace(WANTED, guide_scale=scale)) for scale in (5.0, (4.0, 4.0), (3.5, 4.0))] == [
        "5.mp4",
        "4.mp4",
        "3.5-4.mp4",
    ]


REFUSED = [
    ("{sede}", r"there is no field 'sede'; fields: task, size, .*seed, prompt"),
    ("{}", r"there is no field ''"),
    ("{0}", r"there is no field '0'"),
    ("{prompt.__class__}", r"there is no field 'prompt.__class__'"),
    ("{prompt[0]}", r"there is no field"),
    ("{seed!r}", r"there is no field 'seed!r'"),
    ("{seed", r"write \{field\}, and \{\{ for a brace"),
    ("seed}", r"write \{field\}"),
    ("{prompt:forty}", r"'\{prompt:forty\}' is no length; after the colon of task, .*prompt"),
    ("{prompt:0}", r"is no length"),
    ("{prompt:-3}", r"is no length"),
    ("{prompt:{seed}}", r"is no length"),
    ("{date:4}", r"is no length"),
    ("", r"is empty: give a pattern"),
    ("   ", r"is empty"),
    ("/abs/{seed}", r"neither '\.\.' nor an absolute path; --save_file FOLDER/"),
    ("../{seed}", r"neither '\.\.'"),
    ("a/../../{seed}", r"neither '\.\.'"),
    ("~/{seed}", r"neither"),
    ("C:{seed}", r"neither"),
    ("{date}/", r"ends in '/': add the file's name"),
]
DUMMY = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu"]
SMALL = [*DUMMY, "--size", "16x16", "--any_size", "--frame_num", "5", "--seed", "7"]


@pytest.mark.parametrize(("pattern", "says"), REFUSED)
def test_a_bad_pattern_is_one_line_with_status_2(
    pattern: str, says: str, recorder: list[str], capsys: Any, tmp_path: Path
) -> None:
    assert main([*SMALL, "--name", pattern]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: --name [^\n]*\n", err) and re.search(says, err), err
    assert recorder == [] and list(tmp_path.iterdir()) == []


# Nothing is overwritten -----------------------------------------------------------------------------------------------


def test_numbers_are_added_to_a_taken_name(tmp_path: Path) -> None:
    with Claims() as claims:
        for name in ("clip.mp4", "clip-2.mp4", "clip-3.mp4"):
            path = claims.first_free(tmp_path, numbered(Path("clip.mp4")))
            assert path.name == name
            path.write_bytes(b"a video")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip-2.mp4", "clip-3.mp4", "clip.mp4"]


def test_programs_that_start_in_the_same_second_get_different_names(tmp_path: Path) -> None:
    """Before any of them has written a file; and what they hold is gone after them."""
    claims = [Claims() for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda one: one.first_free(tmp_path, default_paths(WANTED, ".mp4", WHEN)), claims))
    assert len(set(paths)) == 24
    for one in claims:
        one.__exit__()
    assert list(tmp_path.iterdir()) == []


def test_a_name_whose_run_was_killed_is_not_taken_again(tmp_path: Path) -> None:
    kept = run_folder(tmp_path / "clip.mp4")
    kept.mkdir()
    (kept / "state").write_bytes(b"hours")
    with Claims() as claims:
        assert claims.first_free(tmp_path, numbered(Path("clip.mp4"))).name == "clip-2.mp4"
    assert list(tmp_path.iterdir()) == [kept]


def test_an_index_counts_up_to_the_first_new_name(tmp_path: Path) -> None:
    pattern = Pattern("{seed}/{index:3}")
    (tmp_path / "42").mkdir()
    for taken in ("001.mp4", "002.mp4", "004.mp4"):
        (tmp_path / "42" / taken).touch()
    with Claims() as claims:
        found = [claims.first_free(tmp_path, pattern_paths(pattern, WANTED, ".mp4", WHEN)).name for _ in range(3)]
    assert found == ["003.mp4", "005.mp4", "006.mp4"]


def test_names_go_on_for_ever() -> None:
    names = list(itertools.islice(numbered(Path("v1.5.mp4")), 1000))
    assert len(set(names)) == 1000 and names[1].name == "v1.5-2.mp4"


# Through the program --------------------------------------------------------------------------------------------------


class Stub:
    """Stands in for the pipeline's class: a grey video."""

    def __init__(self, **arguments: Any) -> None: ...

    def generate(self, prompt: str, **arguments: Any) -> torch.Tensor:
        width, height = arguments["size"]
        return torch.zeros(3, arguments["frame_num"], height, width)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The prompts that were generated, in a folder of the test's own."""
    made: list[str] = []

    class Recorder(Stub):
        def generate(self, prompt: str, **arguments: Any) -> torch.Tensor:
            made.append(prompt)
            return super().generate(prompt, **arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(wan), "WanT2V", Recorder)
    return made


def test_a_pattern_names_the_file_in_the_folder_given(recorder: list[str], tmp_path: Path, capsys: Any) -> None:
    argv = [*SMALL, "--prompt", "a/b: c?", "--name", "{resolution}/{seed}_{prompt:40}", "--save_file", "out/"]
    assert main(argv) == main(argv) == 0
    assert capsys.readouterr().out.split() == ["out/16p/7_a_b_c_.mp4", "out/16p/7_a_b_c_-2.mp4"]
    assert sorted(path.name for path in (tmp_path / "out" / "16p").iterdir()) == ["7_a_b_c_-2.mp4", "7_a_b_c_.mp4"]


def test_two_runs_without_a_name_make_two_files(recorder: list[str], tmp_path: Path) -> None:
    assert main(SMALL) == main(SMALL) == main(SMALL) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == len(list(tmp_path.iterdir())) == 3


def test_a_file_that_is_named_is_replaced_by_the_new_video_alone(
    recorder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "clip.mp4"
    old.write_bytes(b"the old video")

    tried: list[Path] = []

    def damaged(path: Path) -> Any:
        tried.append(path)
        if len(tried) > 1:  # after the test encode
            raise OutputError("it cannot be played")
        return verify_video(path)

    with monkeypatch.context() as patch:
        patch.setattr("wan.video.encoder.verify_video", damaged)
        assert main([*SMALL, "--save_file", "clip.mp4"]) == 3
    assert old.read_bytes() == b"the old video" and len(tried) > 1
    assert main([*SMALL, "--save_file", "clip.mp4"]) == 0
    assert old.read_bytes() != b"the old video" and len(list(tmp_path.glob("*.mp4"))) == 1


def test_a_plan_and_a_refusal_leave_nothing(recorder: list[str], tmp_path: Path) -> None:
    assert main([*SMALL, "--print_plan"]) == 0
    assert main([*SMALL, "--crf", "99"]) == 2
    assert recorder == [] and list(tmp_path.iterdir()) == []


def test_a_file_name_and_a_pattern_contradict_each_other(recorder: list[str], capsys: Any) -> None:
    assert main([*SMALL, "--save_file", "a.mp4", "--name", "{seed}"]) == 2
    assert "--save_file 'a.mp4' is a file name and --name makes one" in capsys.readouterr().err


def test_texts_are_the_fields_that_may_be_long() -> None:
    assert [field.name for field in FIELDS if field.kind == TEXT] == ["task", "solver", "prompt", "image"]
