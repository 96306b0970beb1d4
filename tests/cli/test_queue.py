"""Queues: each video is the one it would be alone, models are loaded once, one failure stops nothing, and the same
command goes on where it ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan
from wan.cli.generate import main
from wan.cli.queue import JobTerminal
from wan.cli.report import Terminal
from wan.cli.results import Results
from wan.components import Checkpoint
from wan.configs import WAN_CONFIGS
from wan.engine.engine import build_engine
from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.placement import Placement
from wan.engine.plan import Plan
from wan.engine.types import Step
from wan.pipeline import Group
from wan.video import TensorSink

Write = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(tiny_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that make an image in a fraction of a second."""
    tiny_config.sample_steps = 4
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    task = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint), "--device", "cpu", "--no_metadata"]
    return [*task, "--size", "32x16", "--any_size", "--frame_num", "1"]


@pytest.fixture
def queue(base: list[str]) -> Write:
    """Writes the lines (texts, or objects) into a file and returns the command for it."""

    def write(*lines: str | dict[str, Any], name: str = "") -> list[str]:
        path = Path(name or ("jobs.jsonl" if isinstance(lines[0], dict) else "jobs.txt"))
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return [*base, "--prompt_file", str(path)]

    return write


def rows(path: str = "jobs.results.jsonl") -> list[dict[str, Any]]:
    lines = Path(path).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def ends(path: str = "jobs.results.jsonl") -> list[tuple[int, str]]:
    return [(row["index"], row["status"]) for row in rows(path) if row["status"] != "started"]


def litter() -> list[str]:
    return sorted(path.name for path in Path().rglob("*") if path.suffix in (".run", ".part"))


THREE = [
    {"prompt": "a red bird", "save_file": "0.png"},
    {"prompt": "a blue cat on a very long and winding road", "save_file": "1.png", "sample_steps": 5},
    {"prompt": "a dog", "save_file": "2.png", "sample_solver": "euler", "seed": 77},
]


@pytest.fixture
def alone(base: list[str]) -> list[bytes]:
    """The three files, each by a command of its own; made once."""
    if not MADE:
        for index, (job, seed) in enumerate(zip(THREE, (5, 6, 77), strict=True)):
            said = {**job, "save_file": f"alone-{index}.png", "seed": seed}
            assert main([*base, *(word for key, value in said.items() for word in (f"--{key}", str(value)))]) == 0
            MADE.append(Path(said["save_file"]).read_bytes())
    return MADE


MADE: list[bytes] = []


def files(count: int = 3) -> list[bytes]:
    return [Path(f"{index}.png").read_bytes() for index in range(count)]


# The same videos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_every_video_is_the_one_it_would_be_alone(alone: list[bytes], queue: Write, batch: str, capsys: Any) -> None:
    capsys.readouterr()
    assert main([*queue(*THREE), "--seed", "5", "--expert_batch", batch]) == 0
    assert files() == alone
    out, err = capsys.readouterr()
    assert out.split() == ["0.png", "1.png", "2.png"]
    assert [err.count(f"load {name} ...") for name in ("high", "low", "vae")] == [1, 1, 1]
    assert "video   3 of 3" in err and "queue   3 made; results in jobs.results.jsonl" in err
    assert ends() == [(0, "done"), (1, "done"), (2, "done")]
    assert litter() == []


def test_results_say_what_was_made_of_what(queue: Write) -> None:
    assert main([*queue("# birds", "a red bird", "", "a dog"), "--seed", "5", "--save_file", "out/"]) == 0
    done = [row for row in rows() if row["status"] == "done"]
    assert [(row["index"], row["line"], row["prompt"], row["seed"]) for row in done] == [
        (0, 2, "a red bird", 5),
        (1, 4, "a dog", 6),
    ]
    for row in done:
        assert Path(row["path"]).is_file() and Path(row["path"]).parent == Path("out").absolute()
        assert row["error"] is None and 0 < row["seconds"] < 60
    assert [row["status"] for row in rows()] == ["started", "done", "started", "done"]


class Moves:
    """A mover that notes who enters the device."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def to_device(self, name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.entered.append(name)

    def to_host(self, name: str, tensors: Sequence[Tensor]) -> None: ...


@pytest.mark.parametrize(("jobs", "batch", "swaps"), [(4, 4, 2), (4, 2, 4), (4, 1, 8)])
def test_each_expert_enters_the_device_once_for_a_group(
    tiny_checkpoint: Path, tiny_config: Any, jobs: int, batch: int, swaps: int
) -> None:
    device = torch.device("cpu", 0)  # to the placement not the CPU: networks have to enter it
    hardware, known = Hardware(device=device, name="stand-in"), registry()
    moves = Moves()
    plan = Plan.of(known, {"offload_model": True})
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", optimizations=plan)
    pipe.engine = build_engine(
        Checkpoint(tiny_checkpoint, tiny_config).components(), plan, hardware, Placement(device, moves)
    )
    for start in range(0, jobs, batch):
        group = Group()
        for seed in range(start, start + batch):
            pipe.generate("a cat", size=(32, 16), frame_num=1, sampling_steps=3, shift=12.0, seed=seed, group=group,
                          sink=TensorSink())  # fmt: skip
        assert pipe.run_group(group) == [None] * batch
    assert len([name for name in moves.entered if name in ("high", "low")]) == swaps


def test_video_of_a_group_is_saved_before_the_next_one_is_decoded(
    queue: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[str]]] = []
    stage = Terminal.stage

    def watched(self: Terminal, name: str, detail: str = "") -> None:
        seen.append((name, sorted(path.name for path in Path().glob("?.png"))))
        stage(self, name, detail)

    monkeypatch.setattr(Terminal, "stage", watched)
    assert main([*queue(*THREE), "--expert_batch", "3"]) == 0
    assert [there for name, there in seen if name == "decode"] == [[], ["0.png"], ["0.png", "1.png"]]


def test_jobs_with_other_options_are_made_in_groups_of_their_own(queue: Write, capsys: Any) -> None:
    lines = [{**job, "vae_tiling": index == 1} for index, job in enumerate(THREE)]
    assert main([*queue(*lines), "--expert_batch", "3"]) == 0
    err = capsys.readouterr().err
    order = re.findall(r"^(video   \d(?= of)|denoise|saved)", err, flags=re.MULTILINE)
    once = ["denoise", "denoise", "saved"]
    assert order == ["video   1", *once, "video   2", *once, "video   3", *once]


def test_model_with_one_expert_gains_nothing_from_groups_and_that_is_told(tmp_path: Path, capsys: Any) -> None:
    Path("p.txt").write_text("a cat\na dog\n")
    argv = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu", "--prompt_file", "p.txt"]
    assert main([*argv, "--expert_batch", "4", "--print_plan"]) == 0
    assert "--expert_batch 4: t2v-1.3B has one expert, so videos are made one by one" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt"]


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_job_has_the_seed_plus_its_number_unless_it_sets_one(queue: Write) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c", "base_seed": -1}, {"prompt": "d"}]
    assert main([*queue(*lines), "--seed", "5", "--save_file", "out/"]) == 0
    assert [row["seed"] for row in rows() if row["status"] == "done"] == [5, 5, 7, 8]
    assert not any("drawn_seed" in row for row in rows())


def test_drawn_seed_is_drawn_once_told_and_kept_when_the_queue_is_started_again(queue: Write, capsys: Any) -> None:
    argv = [*queue("a cat", "a dog"), "--save_file", "out/"]
    assert main(argv) == 0
    first, second = (row["seed"] for row in rows() if row["status"] == "done")
    assert second == first + 1
    assert f"seeds from {first} on (drawn)" in capsys.readouterr().err
    with Path("jobs.txt").open("a") as file:
        file.write("a bird\n")
    assert main(argv) == 0
    assert [row["seed"] for row in rows() if row["status"] == "done"] == [first, second, first + 2]
    assert "queue   1 made, 2 made before" in capsys.readouterr().err


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["1", "3"])
def test_failing_job_stops_no_other_and_is_tried_again(
    alone: list[bytes], queue: Write, batch: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = JobTerminal.spent
    slow = {"on": True}
    monkeypatch.setattr(
        JobTerminal, "spent", lambda self: spent(self) + 1000 * (slow["on"] and bool(self._steps))  # a slow machine
    )  # fmt: skip
    lines = [dict(job) for job in THREE]
    lines[1]["timeout_s"] = 500
    argv = [*queue(*lines), "--seed", "5", "--expert_batch", batch]
    capsys.readouterr()
    assert main(argv) == 4
    out, err = capsys.readouterr()
    assert out.split() == ["0.png", "2.png"]
    assert "failed  2 of 3: --timeout_s 500: the time was up at step 1 of 5" in err
    assert "queue   2 made, 1 failed (video 2)" in err
    assert sorted(ends()) == [(0, "done"), (1, "failed"), (2, "done")]
    assert "time was up" in next(row["error"] for row in rows() if row["status"] == "failed")
    slow["on"] = False
    written = [Path(f"{index}.png").stat().st_mtime_ns for index in (0, 2)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["1.png"] and "video   2 of 3, continued:" in err
    assert "queue   1 made, 2 made before" in err
    assert files() == alone and litter() == []
    assert [Path(f"{index}.png").stat().st_mtime_ns for index in (0, 2)] == written


def test_worst_status_counts(queue: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One folder goes after the check (2), one video takes too long (4), one is fine (0)."""
    begin = Results.begin

    def spoil(self: Results) -> None:
        begin(self)
        shutil.rmtree("gone")
        Path("gone").write_text("in the way")

    monkeypatch.setattr(Results, "begin", spoil)
    lines = [{"prompt": "a", "save_file": "gone/a.png"}, {"prompt": "b", "timeout_s": 1e-9}, {"prompt": "c"}]
    assert main([*queue(*lines[:1], lines[2]), "--expert_batch", "2"]) == 2
    Path("gone").unlink()
    assert main([*queue(*lines), "--expert_batch", "2", "--results", "other.jsonl"]) == 4
    assert sorted(ends("other.jsonl")) == [(0, "failed"), (1, "failed"), (2, "done")]


def test_encoder_that_fails_for_one_video_of_a_group_hurts_no_other(
    queue: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import imageio_ffmpeg

    real = imageio_ffmpeg.get_ffmpeg_exe()
    Path("ffmpeg").write_text(f'#!/bin/sh\ncase "$*" in *bad*) exit 1;; esac\nexec "{real}" "$@"\n')
    Path("ffmpeg").chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(Path("ffmpeg").absolute()))
    names = ("good.mp4", "bad.mp4", "fine.mp4")
    lines = [{"prompt": "a cat", "save_file": name, "frame_num": 5, "sample_steps": 2} for name in names]
    assert main([*queue(*lines), "--expert_batch", "3"]) == 3
    out, err = capsys.readouterr()
    assert out.split() == ["good.mp4", "fine.mp4"]
    assert "All frames are in 'bad_frames'" in err and len(list(Path("bad_frames").iterdir())) == 5
    assert sorted(ends()) == [(0, "done"), (1, "failed"), (2, "done")]


def test_error_nobody_foresaw_is_told_in_full_and_stops_no_other(
    queue: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    step = JobTerminal.step

    def broken(self: JobTerminal, at: Step, *told: float) -> None:
        if at.count == 5:
            raise KeyError("a bug")
        step(self, at, *told)

    monkeypatch.setattr(JobTerminal, "step", broken)
    assert main([*queue(*THREE), "--expert_batch", "3"]) == 4
    out, err = capsys.readouterr()
    assert out.split() == ["0.png", "2.png"]
    assert "Traceback" in err and "failed  2 of 3: KeyError: 'a bug'" in err


# Ends and beginnings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["1", "3"])
def test_interrupted_queue_goes_on_where_it_was(
    alone: list[bytes], queue: Write, batch: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    step = JobTerminal.step

    def ctrl_c(self: JobTerminal, at: Step, *told: float) -> None:
        step(self, at, *told)
        if at.count == 5 and at.index == 2:
            raise KeyboardInterrupt

    argv = [*queue(*THREE), "--seed", "5", "--expert_batch", batch, "--state_every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(JobTerminal, "step", ctrl_c)
        assert main(argv) == 130
    assert (1, "interrupted") in ends()
    capsys.readouterr()
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "video   2 of 3, continued:" in err and "continuing after step" in err
    assert files() == alone and litter() == []


def test_killed_queue_goes_on_where_it_was(
    alone: list[bytes], queue: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Of a process that had no time to say anything: its results end in the middle of a line."""
    step = JobTerminal.step

    def kill(self: JobTerminal, at: Step, *told: float) -> None:
        step(self, at, *told)
        if at.count == 5 and at.index == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    argv = [*queue(*THREE), "--seed", "5", "--state_every", "1"]
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(JobTerminal, "step", kill)
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in programs with threads
        child = os.fork()
        if child == 0:
            main(argv)
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [row["status"] for row in rows()] == ["started", "done", "started"]
    with Path("jobs.results.jsonl").open("a") as file:
        file.write('{"index": 1, "key": "aaa')
    capsys.readouterr()
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "video   2 of 3, continued:" in err and "continuing after step" in err
    assert files() == alone and litter() == []
    assert len(Path("jobs.results.jsonl").read_text().splitlines()) == 3 + 1 + 4  # the torn line stays by itself


def test_video_that_is_gone_or_was_asked_for_otherwise_is_made_again(queue: Write, capsys: Any) -> None:
    argv = [*queue(*THREE), "--seed", "5"]
    assert main(argv) == 0
    Path("1.png").unlink()
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out.split() == ["1.png"]
    assert main([*argv, "--sample_shift", "3"]) == 0
    assert capsys.readouterr().out.split() == ["0.png", "1.png", "2.png"]


def test_lines_may_move_in_the_file(queue: Write, capsys: Any) -> None:
    lines = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2}, {"prompt": "a", "seed": 1}]
    argv = [*queue(*lines), "--save_file", "out/"]
    assert main(argv) == 0 and len(list(Path("out").iterdir())) == 3
    capsys.readouterr()
    assert main([*queue(lines[1], {"prompt": "new", "seed": 3}, lines[0], lines[2]), *argv[-2:]]) == 0
    assert "queue   1 made, 3 made before" in capsys.readouterr().err


def test_other_weights_in_the_same_folder_make_other_videos(
    queue: Write, tiny_checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    copied = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    argv = [copied.as_posix() if word == str(tiny_checkpoint) else word for word in queue("a cat")]
    argv += ["--seed", "5", "--save_file", "out/"]
    assert main(argv) == 0
    weights = torch.load(copied / "Wan2.1_VAE.pth")
    torch.save({key: value * 1.5 for key, value in weights.items()}, copied / "Wan2.1_VAE.pth")
    assert main(argv) == 0
    assert [row["status"] for row in rows()] == ["started", "done"] * 2
    assert len({row["weights"] for row in rows()}) == 2


def test_unfinished_run_of_something_else_is_not_replaced(queue: Write, capsys: Any) -> None:
    Path("0.png.run").mkdir()
    Path("0.png.run/state.safetensors").write_bytes(b"of somebody else")
    Path("0.png.run/run.json").write_text('{"flags": {"task": "t2v-A14B"}}')
    assert main(queue(*THREE)) == 2
    err = capsys.readouterr().err
    assert "line 1: --save_file '0.png': an unfinished run of it is kept in '0.png.run'" in err
    assert not Path("jobs.results.jsonl").exists()


# What is refused -----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[list[str | dict[str, Any]], list[str], str]] = [
    (["a cat"], ["--prompt", "a dog"], r"--prompt and --prompt_file each say what to make: give one of them"),
    (["a cat"], ["--resume", "x.run"], r"--resume and --prompt_file"),
    (["a cat"], ["--from", "x.mp4"], r"--from and --prompt_file"),
    (["a cat"], ["--expert_batch", "0"], r"--expert_batch 0: give a number of videos, at least 1"),
    (["a cat"], ["--results", "jobs.txt"], r"--results 'jobs\.txt' is the --prompt_file"),
    (["a cat"], ["--results", "."], r"--results '\.' is a folder"),
    (["a cat"], ["--results", "taken.json"], r"--results 'taken\.json', line 1: this is no result of a queue"),
    (["a cat"], ["--results", "taken.json/x.jsonl"], r"--results 'taken\.json/x\.jsonl' can"),
    (["a cat"], ["--embedding_cache", "taken.json"], r"--embedding_cache 'taken\.json'"),
    (["a cat", "a dog"], ["--save_file", "x.png"], r"line 2: --save_file 'x\.png' is the file of line 1 too"),
    ([{"prompt": "a"}, {"prompt": "b", "size": "33x16"}], [], r"jobs\.jsonl', line 2: .*33x16.*multiples of 16"),
    ([{"prompt": "a"}, {"prompt": "b", "frame_num": 4}], [], r"line 2: --frame_num: 4 frames.*4n\+1"),
    ([{"prompt": "a"}, {"prompt": "b", "sample_steps": 0}], [], r"line 2: --sample_steps 0"),
    ([{"prompt": "a"}, {"prompt": "b", "crf": 99}], [], r"line 2: crf=99"),
    ([{"prompt": "a"}, {"prompt": "b", "fps": -1}], [], r"line 2: --fps -1"),
    ([{"prompt": "a"}, {"prompt": "b", "timeout_s": 0}], [], r"line 2: --timeout_s 0"),
    ([{"prompt": "a"}, {"prompt": "b", "name": "{nothing}"}], [], r"line 2: --name .*no field 'nothing'"),
    ([{"prompt": "a"}, {"prompt": "b", "save_file": "b.avi"}], [], r"line 2: .*'b\.avi'"),
    ([{"prompt": "a"}, {"prompt": "b", "seed": 2**64}], [], r"line 2: --base_seed \d+: the largest seed"),
    ([{"prompt": "a"}, {"prompt": "b", "vae_tiling": True, "vae_tile_size": 4}], [], r"line 2: VAE tiles of 4"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "more", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_done_ends_with_status_2_before_anything_is_loaded(
    queue: Write, lines: list[Any], more: list[str], says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(wan), "WanT2V", None)  # whoever calls it, breaks
    Path("taken.json").write_text('{"something": "else"}\n')
    argv = queue(*lines)
    before = {path: path.read_bytes() for path in Path().rglob("*")}
    assert main([*argv, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]*\n", err), err
    assert re.search(says, err), err
    assert {path: path.read_bytes() for path in Path().rglob("*")} == before


def test_a_later_lines_lora_must_fit_what_the_first_line_loads(
    queue: Write, elsewhere: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another model is refused before anything is loaded, and one that would make another model of this."""
    monkeypatch.setitem(vars(wan), "WanT2V", None)  # whoever calls it, breaks
    for key, shape, said in (
        ("blocks.9.ffn.0.diff_b", (64,), "which this transformer lacks"),
        ("patch_embedding.diff", (48, 36, 1, 2, 2), "36 input channels, this model was loaded with 16"),
    ):
        save_file({key: torch.zeros(shape)}, str(elsewhere / "x.safetensors"))
        assert main(queue({"prompt": "a cat"}, {"prompt": "a dog", "lora": "x.safetensors"})) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(rf"error: --prompt_file 'jobs.jsonl', line 2: LoRA 'x.safetensors' .*{said}.*\n", err), err


def test_flags_of_queues_are_refused_for_one_video(base: list[str], capsys: Any) -> None:
    for flag, value in (("--expert_batch", "4"), ("--results", "r.jsonl")):
        assert main([*base, "--prompt", "a cat", flag, value]) == 2
        assert (
            capsys.readouterr().err == f"error: {flag} {value} is for many videos: add --prompt_file or leave it out\n"
        )


def test_checkpoint_that_is_wrong_for_all_is_no_fault_of_a_line(capsys: Any) -> None:
    Path("jobs.txt").write_text("a cat\n")
    assert main(["--task", "t2v-A14B", "--ckpt_dir", "nowhere", "--device", "cpu", "--prompt_file", "jobs.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: --ckpt_dir 'nowhere' is not a folder")


def test_results_whose_disk_fails_cost_no_video(queue: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(self: Results, row: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results, "add", full)
    assert main([*queue("a cat"), "--save_file", "0.png"]) == 0
    assert Path("0.png").is_file() and "no line could be added to --results" in capsys.readouterr().err


# Classes that are not ours -------------------------------------------------------------------------------------------


class Recorder:
    """Makes tensors, as upstream's class does."""

    made = 0

    def __init__(self, **arguments: Any) -> None:
        type(self).made += 1

    def generate(self, prompt: str, **arguments: Any) -> Tensor:
        if prompt == "broken":
            raise RuntimeError("on purpose")
        width, height = arguments["size"]
        return torch.zeros(3, arguments["frame_num"], height, width)


def test_class_with_upstreams_arguments_makes_a_queue_too(
    queue: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fresh = type("Recorder", (Recorder,), {})
    monkeypatch.setitem(vars(wan), "WanT2V", fresh)
    lines = [{"prompt": "a cat"}, {"prompt": "broken"}, {"prompt": "a dog"}, {"prompt": "x", "vae_tiling": True}]
    assert main([*queue(*lines), "--save_file", "out/"]) == 4
    assert fresh.made == 1
    assert ends() == [(0, "done"), (1, "failed"), (2, "done"), (3, "failed")]
    err = capsys.readouterr().err
    assert "failed  2 of 4: RuntimeError: on purpose" in err
    assert "failed  4 of 4: Recorder cannot change options from job to job" in err


# Text embeddings -----------------------------------------------------------------------------------------------------


def test_second_run_never_loads_the_text_encoder(base: list[str], capsys: Any) -> None:
    argv = [*base, "--seed", "1", "--prompt", "a cat", "--save_file"]
    for name, loads in (("a.png", 1), ("b.png", 0)):
        assert main([*argv, name]) == 0
        assert capsys.readouterr().err.count("load text_encoder ...") == loads
    assert main([*argv, "c.png", "--embedding_cache", "off"]) == 0
    assert main([*argv, "d.png", "--embedding_cache", "mine"]) == 0
    assert capsys.readouterr().err.count("load text_encoder ...") == 2
    assert len(list(Path("mine").iterdir())) == 2
    assert len({Path(name).read_bytes() for name in ("a.png", "b.png", "c.png", "d.png")}) == 1


def test_random_weights_keep_no_embeddings(tmp_path: Path) -> None:
    from wan.cli.args import parse
    from wan.cli.embeddings import cache_for
    from wan.engine.plan import options

    args = parse(["--embedding_cache", "mine"], options(registry()))
    hashed = {"weights": {"text_encoder": {"hash": "a"}, "tokenizer": {"hash": "b"}}}
    cache = cache_for(args, hashed)
    assert cache is not None and cache.encoder == "a b"
    assert cache_for(args, {"weights": {}}) is None
    assert cache_for(args, {"weights": {"text_encoder": {"file": "x"}}}) is None
    with pytest.raises(BadRequest, match="--embedding_cache ''"):
        cache_for(parse(["--embedding_cache", ""], options(registry())), hashed)
