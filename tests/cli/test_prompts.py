"""The file of --prompt_file: what its lines say, and that every mistake is told with file and line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from wan.cli.args import parse
from wan.cli.planning import keep_beside
from wan.cli.prompts import Entry, may_differ, read_entries
from wan.engine.errors import BadRequest
from wan.engine.optimizations import registry
from wan.engine.plan import options

KNOWN = registry()


def entries(path: Path, content: bytes | str, argv: list[str] | None = None) -> list[Entry]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_entries(path, command(argv or []), KNOWN)


def command(argv: list[str]) -> argparse.Namespace:
    return parse(argv, options(KNOWN))


def one(tmp_path: Path, fields: dict[str, Any], argv: list[str] | None = None) -> argparse.Namespace:
    return entries(tmp_path / "p.jsonl", json.dumps({"prompt": "a cat"} | fields), argv)[0].args


# Lines ---------------------------------------------------------------------------------------------------------------

TEXTS = [
    (b"a cat\na dog", [(1, "a cat"), (2, "a dog")]),
    (b"\xef\xbb\xbfa cat\r\n\r\n# a comment\r\n  a dog  \r\n", [(1, "a cat"), (4, "a dog")]),
    ("Füchse im Schnee 雪\n".encode(), [(1, "Füchse im Schnee 雪")]),
    ("a cat\u2028on a mat\x0b\x85\n".encode(), [(1, "a cat\u2028on a mat")]),
    (b'{red|blue} bird\n"quoted"\n--seed 3\n', [(1, "{red|blue} bird"), (2, '"quoted"'), (3, "--seed 3")]),
]


@pytest.mark.parametrize(("content", "expected"), TEXTS)
def test_text_file_holds_a_prompt_a_line(tmp_path: Path, content: bytes, expected: list[tuple[int, str]]) -> None:
    found = entries(tmp_path / "p.txt", content)
    assert [(entry.line, entry.args.prompt) for entry in found] == expected


def test_object_a_line_overrules_the_command_line(tmp_path: Path) -> None:
    content = (
        '\ufeff{"prompt": "a cat", "size": "480p", "seed": 7, "sample_guide_scale": [3, 4], "sample_shift": 5}\r\n'
        "# a comment\r\n"
        '{"prompt": "", "n-prompt": "dark", "negative_prompt": "dark", "vae_tiling": true, "offload_model": false}\r\n'
    )
    argv = ["--size", "720p", "--sample_steps", "9", "--seed", "1", "--task", "t2v-A14B"]
    first, second = entries(tmp_path / "p.jsonl", content, argv)
    assert (first.line, first.args.prompt, first.args.size, first.args.base_seed) == (1, "a cat", "480p", 7)
    assert (first.args.sample_guide_scale, first.args.sample_shift, first.args.sample_steps) == ((3.0, 4.0), 5.0, 9)
    assert (first.seed, second.seed) == (7, None)
    assert (second.line, second.args.prompt, second.args.n_prompt, second.args.size) == (3, "", "dark", "720p")
    assert second.args.vae_tiling is True and second.args.offload_model is False
    assert {entry.args.task for entry in (first, second)} == {"t2v-A14B"}


def test_what_a_line_says_takes_the_place_of_what_it_would_contradict(tmp_path: Path) -> None:
    assert one(tmp_path, {"frame_num": 5}, ["--duration", "3"]).duration is None
    assert one(tmp_path, {"duration": 1}, ["--frame_num", "81"]).frame_num is None
    assert one(tmp_path, {"save_file": "a.mp4"}, ["--name", "{seed}"]).name is None
    both = one(tmp_path, {"frame_num": 5, "duration": 0.25}, ["--duration", "3"])
    assert (both.frame_num, both.duration) == (5, 0.25)


def test_switches_are_true_or_false(tmp_path: Path) -> None:
    argv = ["--any_size", "--vae_tiling", "--no_metadata"]
    off = one(tmp_path, {"any_size": False, "vae_tiling": False, "no_metadata": False}, argv)
    assert (off.any_size, off.vae_tiling, off.no_metadata) == (None, False, None)
    on = one(tmp_path, {"any_size": True, "vae_tiling": True})
    assert (on.any_size, on.vae_tiling) == (True, True)


def test_list_of_texts_takes_the_place_of_the_command_lines(tmp_path: Path) -> None:
    given = ["--lora", "a:1", "b", "--lora", "c"]
    assert command(given).lora == one(tmp_path, {}, given).lora == ("a:1", "b", "c")
    assert one(tmp_path, {"lora": ["d", "e:0.5@0-1"]}, given).lora == ("d", "e:0.5@0-1")
    assert one(tmp_path, {"lora": "d"}, given).lora == ("d",)
    assert one(tmp_path, {"lora": []}, given).lora is None
    with pytest.raises(BadRequest, match="a text or a list of texts"):
        one(tmp_path, {"lora": [1]})


def test_jobs_with_different_loras_keep_them_beside_the_weights(tmp_path: Path) -> None:
    def modes(*lines: dict[str, Any], argv: list[str] | None = None) -> set[str | None]:
        content = "\n".join(json.dumps({"prompt": "a cat"} | line) for line in lines)
        found = entries(tmp_path / "p.jsonl", content, argv)
        keep_beside(found)
        return {entry.args.lora_mode for entry in found}

    assert modes({"lora": ["a"]}, {"lora": ["a"]}) == {None}
    assert modes({"lora": ["a"]}, {"lora": ["a:0.5"]}, {}) == {"onthefly"}
    assert modes({"lora_low": ["a"]}, {}, argv=["--lora_mode", "stream"]) == {"stream"}


def test_command_line_itself_stays_as_it_was(tmp_path: Path) -> None:
    args = command(["--size", "720p"])
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "size": "480p"}\n{"prompt": "a dog"}')
    first, second = read_entries(tmp_path / "p.jsonl", args, KNOWN)
    assert (first.args.size, second.args.size, args.size, args.prompt) == ("480p", "720p", "720p", None)


def test_everything_that_is_for_one_call_may_differ_and_nothing_of_loading() -> None:
    able = may_differ(KNOWN)
    assert {"prompt", "n_prompt", "size", "frame_num", "base_seed", "sample_steps", "save_file", "name"} <= able
    assert {"fps", "crf", "timeout_s", "keep_latents", "offload_model", "vae_tiling", "use_batched_cfg"} <= able
    shared = {"task", "ckpt_dir", "dit", "device", "preset", "convert_model_dtype", "compile", "param_dtype"}
    assert not able & {*shared, "attention", "prompt_file", "results", "resume", "decode", "from_", "load_format"}


# Mistakes ------------------------------------------------------------------------------------------------------------

BAD_LINES = [
    ("nonsense", r"bad JSON \(.*\); write one object a line"),
    ('{"prompt": "a cat",}', r"bad JSON"),
    ('["a cat"]', r"'\[\"a cat\"\]' is no JSON object"),
    ('"a cat"', r"is no JSON object"),
    ("[", r"bad JSON"),
    ("[" * 100_000, r"bad JSON"),
    ('{"prompt": "a cat", "prompt": "a dog"}', r"bad JSON \('prompt' stands there twice\)"),
    ('{"size": "480p"}', r'there is no "prompt"'),
    ('{"prompt": "a cat", "promt": "a dog"}', r"unknown key 'promt': did you mean 'prompt'\?"),
    ('{"prompt": "a cat", "zzz": 1}', r"unknown key 'zzz': keys are flags"),
    ('{"prompt": "a cat", "help": true}', r"'help' cannot be given here"),
    ('{"prompt": "a cat", "task": "t2v-14B"}', r"'task' is the same for all jobs: give --task on the command line"),
    ('{"prompt": "a cat", "ckpt_dir": "x"}', r"'ckpt_dir' is the same for all jobs"),
    ('{"prompt": "a cat", "convert_model_dtype": true}', r"'convert_model_dtype' is the same for all jobs"),
    ('{"prompt": "a cat", "prompt_file": "x"}', r"'prompt_file' is the same for all jobs"),
    ('{"prompt": "a cat", "resume": "x"}', r"'resume' is the same for all jobs"),
    ('{"prompt": "a cat", "frame_num": "many"}', r"--frame_num: invalid int value: 'many'"),
    ('{"prompt": "a cat", "frame_num": 4.5}', r"--frame_num: invalid int value: '4.5'"),
    ('{"prompt": "a cat", "frame_num": true}', r"'frame_num' is true, but must be a number"),
    ('{"prompt": "a cat", "frame_num": null}', r"'frame_num' is null, but must be one value"),
    ('{"prompt": "a cat", "fps": [16]}', r"'fps' is \[16\], but must be one value"),
    ('{"prompt": 3}', r"'prompt' is 3, but must be a text"),
    ('{"prompt": true}', r"'prompt' is true, but must be a text"),
    ('{"prompt": ["a", "b"]}', r"'prompt' is \[\"a\", \"b\"\], but must be a text"),
    ('{"prompt": "a cat", "save_file": {}}', r"'save_file' is \{\}, but must be a text"),
    ('{"prompt": "a cat", "any_size": 1}', r"'any_size' is 1, but must be true or false"),
    ('{"prompt": "a cat", "sample_solver": "magic"}', r"--sample_solver: invalid choice: 'magic'"),
    ('{"prompt": "a cat", "sample_guide_scale": [1, 2, 3]}', r"--sample_guide_scale: .*'1,2,3'"),
    ('{"prompt": "a cat", "seed": 1, "base_seed": 2}', r"contradict each other"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), BAD_LINES, ids=lambda value: str(value)[:50])
def test_mistake_in_a_line_is_one_error_with_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "jobs.jsonl"
    with pytest.raises(BadRequest, match=says) as caught:
        entries(path, f'{{"prompt": "fine"}}\n\n{line}\n{{"prompt": "fine"}}\n')
    assert str(caught.value).startswith(f"--prompt_file {str(path)!r}, line 3: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


BAD_FILES = [
    ("p.txt", b"", r"holds no prompt"),
    ("p.txt", b"# only\n\n  \n", r"holds no prompt"),
    ("p.jsonl", b"\n", r"holds no prompt"),
    ("p.txt", b"a cat\nna\xefve\n", r"line 2: not UTF-8"),
    ("p.txt", "a cat".encode("utf-16"), r"is in UTF-16: save it as UTF-8"),
    ("p.txt", b"a cat\nbin\0ary\n", r"line 2: it holds a zero byte"),
    ("p.txt", b'a cat\n{"prompt": "a dog"}\n', r"line 2: this is JSON; name the file \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD_FILES)
def test_file_that_is_no_list_of_prompts_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        entries(tmp_path / name, content)
    assert str(tmp_path / name) in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(BadRequest, match=r"cannot be read: .*; pass a text file"):
            read_entries(path, command([]), KNOWN)


def test_thousand_lines_are_read_in_a_second(tmp_path: Path) -> None:
    import time

    content = "\n".join(json.dumps({"prompt": f"cat {i}", "seed": i, "size": "480p"}) for i in range(1000))
    started = time.process_time()
    assert len(entries(tmp_path / "p.jsonl", content)) == 1000
    assert time.process_time() - started < 2
