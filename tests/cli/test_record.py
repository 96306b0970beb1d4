"""Records: what is in them, that they come back from every kind of file, and that a video repeats itself from one."""

from __future__ import annotations

import datetime
import json
import mmap
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import wan
from wan.cli import memory, record
from wan.cli.args import parse
from wan.cli.generate import Job, main
from wan.cli.presets import make_plan
from wan.cli.request import resolve
from wan.configs import WAN_CONFIGS
from wan.engine.accounting import Forwards, Report
from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware, probe
from wan.engine.optimizations import registry
from wan.engine.plan import Plan, options
from wan.runs import Run, write_tensors
from wan.video import Output, VideoInfo, open_sink, read_metadata

KNOWN = registry()
DUMMY = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu"]


def record_of(argv: list[str], path: Path = Path("clip.mp4")) -> dict[str, Any]:
    args = parse(argv, options(KNOWN))
    hardware, wanted = probe("cpu"), resolve(args)
    job = Job(
        wanted=wanted, plan=make_plan(args, KNOWN, hardware, "none"), plain=Plan.of(KNOWN, {}), hardware=hardware,
        output=Output(path, fps=wanted.fps), device="cpu", crf=None,
    )  # fmt: skip
    return record.build(args, job)


@pytest.fixture
def tiny(tiny_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments that run a whole generation in a second."""
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    monkeypatch.chdir(tmp_path)
    task = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint), "--size", "64x48", "--any_size"]
    return [*task, "--sample_steps", "3", "--frame_num", "5", "--seed", "1", "--crf", "0", "--device", "cpu"]


# What is in it -------------------------------------------------------------------------------------------------------


def test_record_is_json_with_everything_that_was_resolved() -> None:
    made = record_of([*DUMMY, "--prompt", "a red fox", "--sample_guide_scale", "6"], Path("out/clip.mp4"))
    assert json.loads(json.dumps(made)) == made
    flags = made["flags"]
    assert (flags["task"], flags["prompt"], flags["size"]) == ("t2v-1.3B", "a red fox", "832*480")
    assert flags["n_prompt"] == WAN_CONFIGS["t2v-1.3B"].sample_neg_prompt
    assert flags["base_seed"] >= 0 and flags["noise_device"] == "cpu"
    assert (flags["sample_solver"], flags["sample_steps"], flags["sample_guide_scale"]) == ("unipc", 50, 6.0)
    assert (flags["frame_num"], flags["fps"], flags["crf"], flags["attention"]) == (81, 16, 10, "auto")
    plan = Plan.of(KNOWN, {"attention": "auto", "offload_model": True})
    assert made["plan"] == json.loads(json.dumps(plan.values()))
    assert made["versions"]["torch"] == torch.__version__ and made["version"] == wan.__version__
    assert made["device"]["type"] == "cpu" and "threads" in made["device"]["name"]
    assert made["output"]["path"] == str(Path("out/clip.mp4").absolute())
    assert datetime.datetime.fromisoformat(made["created"]).tzinfo is not None
    assert made["weights"] == {}


def test_every_part_of_a_checkpoint_is_named_with_its_hash(tiny: list[str], tiny_checkpoint: Path) -> None:
    weights = record_of(tiny)["weights"]
    assert set(weights) == {"high", "low", "text_encoder", "tokenizer", "vae"}
    assert all(re.fullmatch("(sampled-)?sha256:[0-9a-f]{64}", part["hash"]) for part in weights.values())
    assert weights["vae"]["file"] == str(tiny_checkpoint / "Wan2.1_VAE.pth")
    assert weights["high"]["hash"] != weights["low"]["hash"]


def test_letters_that_are_no_text_do_not_break_the_record() -> None:
    made = record_of([*DUMMY, "--prompt", "a fox \udcff and\ud83d a hare"])
    assert "?" in made["flags"]["prompt"]
    json.dumps(made, ensure_ascii=False).encode()


def test_result_tells_forwards_pace_and_memory() -> None:
    forwards = Forwards({("high", "cond"): (2, 2), ("low", "cond"): (3, 3), ("low", "uncond"): (1, 3)})
    forwards.done = Counter({("high", "cond"): 2, ("low", "cond"): 3, ("low", "uncond"): 2})
    report = Report(
        forwards=[forwards, forwards], step_seconds={"high": [9.0, 1.0, 2.0], "low": [4.0]}, decode="whole",
        kernels={"high": "flash3", "low": "flash3"},
    )  # fmt: skip
    stages = [("load high", 1.0), ("denoise", 12.0), ("load high", 0.5), ("denoise", 4.0)]
    made = record_of(DUMMY)
    whole = record.complete(made, report=report, stages=stages, peak_bytes=7, frames=VideoInfo(5, 64, 48, 16.0))
    assert {**whole, "result": None} == {**made, "result": None}
    assert whole["result"] == {
        "seconds": 17.5,
        "stages_s": {"load high": 1.5, "denoise": 16.0},
        "high_s": 12.0, "high_steps": 3, "high_s_per_step": 1.5,
        "low_s": 4.0, "low_steps": 1, "low_s_per_step": 4.0,
        "forwards": {
            "high": {"cond": {"done": 4, "planned": 4}},
            "low": {"cond": {"done": 6, "planned": 6}, "uncond": {"done": 4, "planned": [2, 6]}},
        },
        "decode": "whole",
        "attention": {"high": "flash3", "low": "flash3"},
        "peak_ram_bytes": 7,
        "video": {"frames": 5, "width": 64, "height": 48, "fps": 16.0},
    }  # fmt: skip
    assert json.loads(json.dumps(whole)) == whole


def test_one_expert_goes_by_its_name_and_a_class_that_counts_nothing_has_times_only() -> None:
    made = record_of(DUMMY)
    report = Report(step_seconds={"dit": [1.0, 1.0]})
    assert record.complete(made, report=report, stages=[], peak_bytes=None)["result"]["dit_s"] == 2.0
    alone = record.complete(made, report=None, stages=[("denoise", 1.0)], peak_bytes=None)
    assert alone["result"] == {"seconds": 1.0, "stages_s": {"denoise": 1.0}}


def test_peak_of_memory_follows_what_is_allocated() -> None:
    cpu = Hardware(device=torch.device("cpu"), name="CPU")
    memory.reset_peak(cpu.device)
    before = record.peak_bytes(cpu)
    size = 64 << 20
    with mmap.mmap(-1, size) as held:  # new pages for certain, which an allocator need not ask for
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        after = record.peak_bytes(cpu)
    assert before is not None and after is not None
    assert size // 2 < after - before < 4 * size


# Where it comes back from --------------------------------------------------------------------------------------------

TEXT = "a \"red\" fox,\nin snow; 100 % = 'schön' # 雪 \\ 🦊"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.mkv", "clip.png"])
def test_record_comes_back_from_the_file_it_is_in(tmp_path: Path, name: str) -> None:
    made = record_of([*DUMMY, "--prompt", TEXT * 20])
    frames = 1 if name.endswith("png") else 2
    with open_sink(Output(tmp_path / name, metadata=record.Tags(lambda: made))) as sink:
        sink.write(torch.zeros(3, frames, 32, 32))
    assert record.read(tmp_path / name) == made
    assert read_metadata(tmp_path / name)["title"] == TEXT * 20


def test_record_comes_back_from_sidecar_run_state_and_latents(tmp_path: Path) -> None:
    made = record_of([*DUMMY, "--prompt", TEXT])
    sidecar = record.sidecar_path(tmp_path / "clip.mp4")
    record.write_sidecar(made, sidecar)
    assert sidecar.name == "clip.mp4.json" and list(tmp_path.iterdir()) == [sidecar]
    Run(tmp_path / "clip.mp4.run", made).begin()
    latents = tmp_path / "clip.latents.safetensors"
    write_tensors(latents, {"latents": torch.zeros(1)}, {"record": json.dumps(made, ensure_ascii=False)})
    for place in (sidecar, tmp_path / "clip.mp4.run", latents):
        assert record.read(place) == made


def test_video_without_metadata_is_known_by_its_sidecar_and_with_it_by_the_newer_result(tmp_path: Path) -> None:
    made, video = record_of(DUMMY), tmp_path / "clip.mp4"
    whole = record.complete(made, report=None, stages=[("denoise", 1.0)], peak_bytes=None)
    record.write_sidecar(whole, record.sidecar_path(video))
    with open_sink(Output(video)) as sink:
        sink.write(torch.zeros(3, 2, 32, 32))
    assert record.read(video) == whole
    with open_sink(Output(video, metadata=record.Tags(lambda: made))) as sink:
        sink.write(torch.zeros(3, 2, 32, 32))
    assert record.read(video) == whole
    for stale in (json.dumps({**whole, "created": "2020-01-01T00:00:00+00:00"}), "{"):
        record.sidecar_path(video).write_text(stale)
        assert record.read(video) == made


@pytest.mark.parametrize("name", ["still.jpg", "still.webp"])
def test_image_that_carries_no_text_is_known_by_its_sidecar(tmp_path: Path, name: str) -> None:
    made = record_of(DUMMY)
    with open_sink(Output(tmp_path / name, metadata=record.Tags(lambda: made))) as sink:
        sink.write(torch.zeros(3, 1, 32, 32))
    record.write_sidecar(made, record.sidecar_path(tmp_path / name))
    assert record.read(tmp_path / name) == made


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.mp4", None, r"--from '.*gone\.mp4': there is no such file; pass a video, its \.json or kept latents"),
        ("a.json", b"{", r"its record is damaged .*; spell the flags instead"),
        ("a.json", b"[" * 100_000, r"its record is damaged"),
        ("a.json", b"\xff\xfe\xff", r"cannot be read .*; pass another file"),
        ("a.json", b"[1]", r"holds JSON that is no record of generate\.py"),
        ("a.json", b'{"name": "package"}', r"holds JSON that is no record"),
        ("a.json", b'{"format": 99, "version": "7.1"}', r"format 99, made by version 7\.1; .*: use that"),
        ("a.json", b'{"format": 1, "flags": []}', r"'flags' in its record is no table"),
        ("a.safetensors", b"nonsense", r"cannot be read"),
        ("a.mp4", b"nonsense", r"a\.mp4"),
        ("a.txt", b"nonsense", r"a\.txt"),
    ],
)  # fmt: skip
def test_file_without_a_record_is_refused_with_a_way_on(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest, match=says):
        record.read(tmp_path / name)


def test_video_without_a_record_says_so(tmp_path: Path) -> None:
    with open_sink(Output(tmp_path / "clip.mp4", metadata={"comment": "my holiday"})) as sink:
        sink.write(torch.zeros(3, 2, 32, 32))
    with pytest.raises(BadRequest, match=r"holds no record: it was made with --no_metadata or by another program"):
        record.read(tmp_path / "clip.mp4")
    write_tensors(tmp_path / "a.safetensors", {"latents": torch.zeros(1)}, {})
    with pytest.raises(BadRequest, match=r"holds no record: pass latents or state that generate\.py kept"):
        record.read(tmp_path / "a.safetensors")
    with pytest.raises(BadRequest, match=r"there is no such file"):
        record.read(tmp_path)


# From the command line -----------------------------------------------------------------------------------------------


def frames_of(path: str) -> bytes:
    import subprocess

    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_video_is_repeated_frame_by_frame_from_its_file_alone(tiny: list[str], capsys: Any) -> None:
    assert main([*tiny, "--prompt", TEXT, "--use_batched_cfg", "--save_file", "first.mp4"]) == 0
    Path("first.mp4.json").unlink()
    assert main(["--from", "first.mp4", "--device", "cpu", "--save_file", "again.mp4"]) == 0
    assert frames_of("again.mp4") == frames_of("first.mp4")
    assert "the same bits can be expected" in capsys.readouterr().err
    assert record.read(Path("again.mp4"))["flags"] == record.read(Path("first.mp4"))["flags"]
    assert main(["--from", "first.mp4", "--seed", "2", "--device", "cpu", "--save_file", "other.mp4"]) == 0
    assert frames_of("other.mp4") != frames_of("first.mp4")
    err = capsys.readouterr().err
    assert "--seed 2 instead of 1" in err and "this makes another video" in err


def test_sidecar_tells_what_the_run_did(tiny: list[str], capsys: Any) -> None:
    assert main([*tiny, "--save_file", "clip.mp4"]) == 0
    made = json.loads(Path("clip.mp4.json").read_text("utf-8"))
    result = made["result"]
    done = {expert: {b: c["done"] for b, c in counts.items()} for expert, counts in result["forwards"].items()}
    assert sum(counts["cond"] for counts in done.values()) == 3
    assert result["high_s_per_step"] > 0 and result["peak_ram_bytes"] > 1 << 20
    assert result["attention"] == {"high": "sdpa", "low": "sdpa"} and result["decode"] == "whole"
    assert (result["video"]["frames"], result["video"]["width"], result["video"]["height"]) == (5, 64, 48)
    inside = json.loads(read_metadata(Path("clip.mp4"))["comment"])
    assert {**inside, "result": None} == {**made, "result": None}
    assert {name: inside["result"][name] for name in ("forwards", "high_s", "low_s_per_step")}.items() <= result.items()
    forwards, pace = r"high \d \w+ \+ \d \w+, low \d \w+ \+ \d \w+", r"high \d steps in .*; low .* s/step"
    told = rf"ran     forwards {forwards}, as planned\npace    {pace}\nmemory  at most \d\.\d\d GiB of RAM in use"
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "inside", "beside"),
    [([], True, True), (["--no_sidecar"], True, False), (["--no_metadata"], False, False)],
)
def test_what_is_kept_is_the_users_choice(tiny: list[str], flags: list[str], inside: bool, beside: bool) -> None:
    assert main([*tiny, "--prompt", "a secret fox", "--save_file", "clip.mp4", *flags]) == 0
    assert (b"secret fox" in Path("clip.mp4").read_bytes()) == inside
    assert sorted(path.name for path in Path().iterdir()) == ["clip.mp4", "clip.mp4.json"][: 1 + beside]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--from", "gone.mp4"], r"--from 'gone\.mp4': there is no such file"),
        (["--from", "plain.json"], r"--from 'plain\.json' holds JSON that is no record"),
        (["--from", "plain.json", "--resume", "x"], r"--resume and --from each name what to continue from"),
    ],
)
def test_bad_source_ends_with_status_2_and_one_line(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.json").write_text("{}")
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", err) and re.search(says, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["plain.json"]
