"""A record fills a command line that makes the same video, refuses contradictions, and tells what is different."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from wan.cli import record
from wan.cli.args import FLAGS, parse
from wan.cli.generate import Job
from wan.cli.presets import make_plan
from wan.cli.replay import FILES, OTHERS, PIXELS, apply, changed_weights, differences, require_same_start
from wan.cli.request import Wanted, resolve
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadRequest
from wan.engine.hardware import probe
from wan.engine.optimizations import registry
from wan.engine.plan import Plan, options
from wan.video import Output

KNOWN = registry()
OPTIONS = options(KNOWN)
DUMMY = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu"]


def job_of(argv: list[str], default_preset: str = "none") -> tuple[argparse.Namespace, Job]:
    args = parse(argv, OPTIONS)
    return args, job_from(args, default_preset)


def job_from(args: argparse.Namespace, default_preset: str = "none") -> Job:
    wanted, hardware = resolve(args), probe(args.device)
    name = "clip.png" if wanted.num_frames == 1 else "clip.mp4"
    output = Output(Path(name), fps=wanted.fps, **({} if args.crf is None else {"crf": args.crf}))
    return Job(
        wanted=wanted, plan=make_plan(args, KNOWN, hardware, default_preset), plain=Plan.of(KNOWN, {}),
        hardware=hardware, output=output, device=args.device, crf=args.crf,
    )  # fmt: skip


def record_of(argv: list[str]) -> dict[str, Any]:
    """The record of a command line, as it comes back from a file."""
    made: dict[str, Any] = json.loads(json.dumps(record.build(*job_of(argv))))
    return made


def filled(made: dict[str, Any], argv: list[str], *, strict: bool = False) -> tuple[argparse.Namespace, list[str]]:
    args = parse(argv, OPTIONS)
    return args, apply(args, made, source="--from 'clip.mp4'", strict=strict)


def comparable(wanted: Wanted, device: str) -> Wanted:
    """Without the reasons, and with what None and "" stand for."""
    return dataclasses.replace(
        wanted,
        why={},
        n_prompt=wanted.n_prompt or wanted.config.sample_neg_prompt,
        noise_device=wanted.noise_device or device,
    )


# Repeating -----------------------------------------------------------------------------------------------------------

CHOICES: list[list[list[str]]] = [
    [[], ["--prompt", 'a "red" fox,\nin snow ünd 雪'], ["--prompt", ""]],
    [[], ["--n_prompt", "dark"]],
    [[], ["--size", "320x192", "--any_size"]],
    [[], ["--frame_num", "5"], ["--duration", "2.1"]],
    [[], ["--seed", "0"], ["--seed", str(2**64 - 1)], ["--seed", "-1"]],
    [[], ["--noise_device", "cpu"]],
    [[], ["--sample_solver", "euler"], ["--sample_solver", "dpm++"]],
    [[], ["--sample_steps", "7"]],
    [[], ["--sample_shift", "3.3"]],
    [[], ["--sample_guide_scale", "4.5"]],
    [[], ["--fps", "30"]],
    [[], ["--crf", "0"]],
    [[], ["--attention", "sdpa"]],
    [[], ["--offload_model", "False"], ["--offload_model", "True"]],
    [[], ["--vae_tiling", "--vae_tile_size", "16", "--vae_tile_overlap", "4"], ["--vae_cpu"]],
    [[], ["--t5_cpu"], ["--tf32"], ["--no-tf32"]],
    [[], ["--use_batched_cfg"], ["--param_dtype", "float32"], ["--convert_model_dtype"]],
    [[], ["--preset", "cpu"]],
]
TASKS = {
    "t2v-1.3B": ["--size", "480p"],
    "t2v-14B": ["--size", "720*1280"],
    "t2v-A14B": ["--sample_guide_scale", "3,4.5"],
    "t2v-demo": ["--frame_num", "9"],
    "t2i-14B": ["--size", "1024*1024"],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", range(8))
def test_record_makes_the_same_video_the_same_way_from_an_empty_command_line(task: str, case: int) -> None:
    draw = random.Random(f"{task} {case}")
    choices = [[[], own], *CHOICES] if (own := TASKS[task]) else CHOICES
    argv, taken = (
        ["--task", task, "--load_format", "dummy", "--device", "cpu"],
        {"--frame_num"} if "2i" in task else set(),
    )
    for words in map(draw.choice, choices):
        if words and words[0].replace("duration", "frame_num") not in taken:
            argv += words
            taken.add(words[0])
    args, job = job_of(argv)
    made = json.loads(json.dumps(record.build(args, job)))
    again, different = filled(made, ["--device", "cpu"])
    repeated = job_from(again)
    assert different == []
    assert comparable(repeated.wanted, "cpu") == comparable(job.wanted, "cpu")
    assert (repeated.plan, repeated.output) == (job.plan, job.output)
    assert differences(made, record.build(again, repeated)) == ["the same bits can be expected"]


@pytest.mark.parametrize("default_preset", ["none", "auto"])
def test_program_with_another_default_preset_repeats_the_plan_too(default_preset: str) -> None:
    args, job = job_of(DUMMY, default_preset)
    made = json.loads(json.dumps(record.build(args, job)))
    for other in ("none", "auto"):
        again = parse(["--device", "cpu"], OPTIONS)
        apply(again, made, source="--from", strict=False)
        assert job_from(again, other).plan == job.plan


def test_loras_are_repeated_from_any_folder_and_known_by_their_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = (Path(__file__).parents[1] / "data" / "lora-tiny.safetensors").read_bytes()
    Path("a.safetensors").write_bytes(tiny)
    made = record_of([*DUMMY, "--lora", "a.safetensors:0.5@0-0.25", "a.safetensors"])
    path = tmp_path / "a.safetensors"
    assert made["flags"]["lora"] == made["plan"]["lora"] == [f"{path}:0.5@0-0.25", f"{path}:1"]
    assert made["weights"]["lora 1"]["hash"].startswith("sha256:")
    again, different = filled(made, ["--device", "cpu"])
    assert again.lora == tuple(made["flags"]["lora"]) and different == []
    spelled = ["--device", "cpu", "--lora", "a.safetensors:0.50@0-0.25", "a.safetensors"]
    assert filled(made, spelled, strict=True)[1] == []
    with pytest.raises(BadRequest, match=r"--lora a.safetensors contradicts --from 'clip.mp4'"):
        filled(made, ["--device", "cpu", "--lora", "a.safetensors"], strict=True)
    path.write_bytes(tiny[:-1] + b"!")
    now = record.build(again, job_from(again))
    assert differences(made, now)[-1] == "this makes another video"


def test_defaults_may_change_and_the_video_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made = record_of(DUMMY)
    config = copy.deepcopy(WAN_CONFIGS["t2v-1.3B"])
    config.update(sample_steps=3, sample_shift=1.5, sample_guide_scale=9.0, frame_num=13, sample_fps=24)
    config.update(sample_neg_prompt="nothing at all")
    monkeypatch.setitem(WAN_CONFIGS, "t2v-1.3B", config)
    monkeypatch.setattr("wan.cli.args.PROGRAM_DEFAULTS", {})
    again = job_from(filled(made, ["--device", "cpu"])[0])
    assert record.build(parse([], OPTIONS), again)["flags"] == made["flags"]


def test_every_flag_of_a_record_is_one_that_can_be_filled() -> None:
    named = {*PIXELS, *FILES, *OTHERS}
    assert named <= {flag.name for flag in FLAGS}
    assert set(record_of(DUMMY)["flags"]) <= named | {o.name for o in OPTIONS}


def test_log_names_only_what_the_record_changed() -> None:
    args, _ = filled(record_of([*DUMMY, "--vae_cpu"]), ["--device", "cpu"])
    assert {o.name for o in OPTIONS if getattr(args, o.name) is not None} == {"vae_cpu"}


# What is spelled beside it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "a cat"], "--prompt a cat instead of 'a red fox'"),
        (["--seed", "8"], "--seed 8 instead of 7"),
        (["--seed", "-1"], "--seed -1 instead of 7"),
        (["--size", "480*832"], "--size 480*832 instead of 832*480"),
        (["--sample_guide_scale", "3"], "--sample_guide_scale 3.0 instead of 5.0"),
        (["--use_batched_cfg"], "--use_batched_cfg instead of off"),
        (["--preset", "cpu"], "--preset cpu instead of the options it was made with"),
    ],
)
def test_what_is_spelled_wins_and_is_told(argv: list[str], said: str) -> None:
    made = record_of([*DUMMY, "--seed", "7", "--prompt", "a red fox"])
    args, different = filled(made, argv)
    assert different == [said]
    spelled = parse(argv, OPTIONS)
    assert all(getattr(args, name) == value for name, value in vars(spelled).items() if value is not None)
    assert args.sample_steps == 50


@pytest.mark.parametrize(
    "argv",
    [
        ["--size", "480p"],
        ["--size", "832x480"],
        ["--seed", "7"],
        ["--seed", "-1"],
        ["--sample_guide_scale", "5,5"],
        ["--duration", "5"],
        ["--frame_num", "81"],
        ["--preset", "none"],
        ["--attention", "auto"],
    ],
)
def test_other_spellings_of_the_same_contradict_nothing(argv: list[str]) -> None:
    args, different = filled(record_of([*DUMMY, "--seed", "7"]), argv, strict=True)
    assert different == []
    if argv[0] != "--sample_guide_scale":  # one expert takes one number
        assert resolve(args).num_frames == 81 and resolve(args).seed == 7


CONTRADICTIONS = [
    (["--prompt", "a cat"], r"--prompt a cat contradicts --resume 'clip\.run', which has --prompt 'a red fox': leave"),
    (["--seed", "8"], r"--seed 8 contradicts .* --base_seed 7: leave the flag out, or start a new video"),
    (["--size", "480*832"], r"--size 480\*832 contradicts"),
    (["--frame_num", "5"], r"--frame_num 5 contradicts .* --frame_num 81"),
    (["--duration", "2"], r"--duration 2\.0 contradicts .* --frame_num 81"),
    (["--sample_steps", "9"], r"--sample_steps 9 contradicts .* --sample_steps 50"),
    (["--sample_solver", "euler"], r"--sample_solver euler contradicts .* unipc"),
    (["--task", "t2v-14B"], r"--task t2v-14B contradicts"),
    (["--param_dtype", "float32"], r"--param_dtype float32 contradicts|has --param_dtype"),
    (["--use_batched_cfg"], r"--use_batched_cfg contradicts .* off"),
    (["--no-tf32"], r"--no-tf32 contradicts"),
    (["--preset", "cpu"], r"--preset 'cpu' contradicts .* its options already: leave the flag out"),
]


@pytest.mark.parametrize(("argv", "says"), CONTRADICTIONS, ids=lambda value: " ".join(value) if value[0] else None)
def test_run_that_goes_on_refuses_what_would_change_its_frames(argv: list[str], says: str) -> None:
    made = record_of([*DUMMY, "--seed", "7", "--prompt", "a red fox", "--tf32", "--param_dtype", "bfloat16"])
    with pytest.raises(BadRequest, match=says):
        apply(parse(argv, OPTIONS), made, source="--resume 'clip.run'", strict=True)


@pytest.mark.parametrize(
    "argv",
    [
        ["--save_file", "other.mp4"],
        ["--name", "{seed}"],
        ["--crf", "20"],
        ["--fps", "24"],
        ["--device", "cpu"],
        ["--offload_model", "False"],
        ["--vae_cpu"],
        ["--vae_tiling", "--vae_tile_size", "16"],
        ["--load_format", "dummy"],
        ["--no_metadata"],
    ],
)
def test_run_that_goes_on_may_go_elsewhere_and_run_otherwise(argv: list[str]) -> None:
    args, _ = filled(record_of(DUMMY), argv, strict=True)
    spelled = parse(argv, OPTIONS)
    assert all(getattr(args, name) == value for name, value in vars(spelled).items() if value is not None)


def test_preset_a_run_was_started_with_may_be_spelled_again() -> None:
    made = record_of([*DUMMY, "--preset", "cpu"])
    args, different = filled(made, ["--preset", "cpu", "--device", "cpu"], strict=True)
    assert different == [] and json.loads(json.dumps(job_from(args).plan.values())) == made["plan"]


@pytest.mark.parametrize(
    ("recorded", "argv", "has_cuda", "filled_in"),
    [
        ("cpu", ["--device", "cpu"], False, None),
        ("cpu", [], True, "cpu"),
        ("cuda", [], True, None),
        ("cuda", ["--device", "cpu"], True, "cuda"),
        ("cuda", [], False, None),
        ("cuda", ["--noise_device", "cpu"], True, "cpu"),
    ],
)
def test_noise_comes_from_where_it_came_if_that_is_here(
    recorded: str, argv: list[str], has_cuda: bool, filled_in: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_flags(record_of(DUMMY), noise_device=recorded)
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    assert filled(made, argv)[0].noise_device == filled_in


# Weights -------------------------------------------------------------------------------------------------------------


def with_flags(made: dict[str, Any], **flags: Any) -> dict[str, Any]:
    return {**made, "flags": {**made["flags"], **flags}}


def test_folder_of_another_machine_is_asked_for(tmp_path: Path) -> None:
    made = with_flags(record_of(DUMMY), ckpt_dir=str(tmp_path / "gone"), load_format="auto")
    with pytest.raises(BadRequest, match=r"was made with --ckpt_dir '.*gone', which is not here: pass --ckpt_dir with"):
        filled(made, [])
    args, _ = filled(made, ["--ckpt_dir", str(tmp_path)])
    assert args.ckpt_dir == str(tmp_path)


def test_spelled_checkpoint_replaces_all_recorded_weights(tmp_path: Path) -> None:
    made = with_flags(record_of(DUMMY), vae=str(tmp_path / "gone.pth"), dit="there.safetensors")
    args, _ = filled(made, ["--ckpt_dir", "mine"])
    assert (args.vae, args.dit, args.load_format) == (None, None, None)
    args, _ = filled(made, ["--load_format", "dummy"])
    assert (args.vae, args.dit) == (None, None)


def test_hub_name_is_recorded_as_given_and_folders_as_absolute_paths(
    tiny_checkpoint: Path, tiny_config: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    monkeypatch.chdir(tiny_checkpoint.parent)
    made = record_of(["--ckpt_dir", tiny_checkpoint.name, "--vae", f"{tiny_checkpoint.name}/Wan2.1_VAE.pth"])
    assert made["flags"]["ckpt_dir"] == str(tiny_checkpoint)
    assert made["flags"]["vae"] == str(tiny_checkpoint / "Wan2.1_VAE.pth")
    args, _ = filled(made, [])
    monkeypatch.chdir("/")
    assert resolve(args).checkpoint == tiny_checkpoint
    assert filled(with_flags(made, ckpt_dir="Wan-AI/Wan2.2-T2V-A14B"), [])[0].ckpt_dir == "Wan-AI/Wan2.2-T2V-A14B"


def test_run_goes_on_with_the_weights_it_began_with_only() -> None:
    made = {"weights": {"vae": {"file": "/a/vae.pth", "hash": "sha256:1"}, "dit": {"file": "/a/dit.pth"}}}
    moved = {
        "weights": {"vae": {"file": "/b/vae.pth", "hash": "sha256:1"}, "dit": {"file": "/a/x", "hash": "sha256:9"}}
    }
    require_same_start(made, moved, source="--resume 'clip.run'")
    other = {"weights": {"vae": {"file": "/b/vae.pth", "hash": "sha256:2"}}}
    assert changed_weights(made, other) == ["vae"]
    with pytest.raises(BadRequest, match=r"--resume 'clip.run' was begun with other weights of vae than '/b/vae.pth'"):
        require_same_start(made, other, source="--resume 'clip.run'")


def test_run_goes_on_with_the_picture_it_began_with_only() -> None:
    made = {"inputs": {"image": {"file": "/a/cat.png", "hash": "sha256:1"}}}
    require_same_start(made, {"inputs": {"image": {"file": "/b/cat.png", "hash": "sha256:1"}}}, source="--resume 'x'")
    other = {"inputs": {"image": {"file": "/a/cat.png", "hash": "sha256:2"}}}
    with pytest.raises(
        BadRequest, match=r"--resume 'x' was begun with another --image: '/a/cat\.png' has changed since"
    ):
        require_same_start(made, other, source="--resume 'x'")


def test_run_goes_on_only_where_its_noise_comes_from() -> None:
    now = record_of(DUMMY)
    with pytest.raises(
        BadRequest, match=r"--resume 'clip.run' draws its noise on cuda, here it would be cpu: continue"
    ):
        require_same_start(with_flags(now, noise_device="cuda"), now, source="--resume 'clip.run'")


# Records that are not ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", 3), ("prompt", ["a"]), ("size", None), ("frame_num", "81"), ("frame_num", True), ("frame_num", 5.5),
        ("base_seed", 1.5), ("sample_solver", "magic"), ("sample_shift", "5"), ("sample_guide_scale", [1, 2, 3]),
        ("sample_guide_scale", ["a", "b"]), ("ckpt_dir", {}), ("load_format", "pickle"), ("any_size", "yes"),
        ("noise_device", "tpu"), ("vae_tile_size", "wide"), ("attention", "mine"), ("offload_model", 1.5),
    ],
)  # fmt: skip
def test_value_its_flag_would_refuse_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=rf"^--from 'clip\.mp4': its record(:| has) {name} = "):
        filled(with_flags(record_of(DUMMY), **{name: value}), [])


def test_record_never_says_where_to_write_or_what_to_read_besides_weights() -> None:
    harmful = {"save_file": "/etc/passwd", "name": "../x", "preset": "/tmp/x.toml", "from": "x", "resume": "y"}
    harmful |= {"device": "cpu", "offline": True, "print_plan": True, "keep_latents": True}
    args, different = filled(with_flags(record_of(DUMMY), **harmful), [])
    left = {name: value for name, value in vars(args).items() if name in {*harmful, "from_"} and value is not None}
    assert left == {"preset": "none"}
    assert len(different) == len(harmful)


def test_run_of_a_version_with_more_flags_is_not_continued() -> None:
    with pytest.raises(BadRequest, match=r"made by version 0\..* with --sharpness, which this version does not have"):
        filled(with_flags(record_of(DUMMY), sharpness=2), [], strict=True)


# What is different ---------------------------------------------------------------------------------------------------


def changed(made: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at `path` ("versions torch")."""
    other = copy.deepcopy(made)
    *tables, name = path.split()
    place = other
    for table in tables:
        place = place.setdefault(table, {})
    place[name] = value
    return other


SAME, SCENE, ANOTHER = "the same bits can be expected", "the same scene can be expected", "this makes another video"


@pytest.mark.parametrize(
    ("path", "value", "line", "verdict"),
    [
        ("created", "2020", None, SAME),
        ("versions torch", "2.1.0", r"torch 2\.1\.0 then, 2\.\S+ now", SCENE),
        ("versions flash-attn", "2.8", r"flash-attn 2\.8 then, none now", SCENE),
        ("versions imageio-ffmpeg", "0.1", r"imageio-ffmpeg 0\.1 then, \S+ now", SAME),
        ("version", "0.0.1", r"wan 0\.0\.1 then, \S+ now", SCENE),
        ("device name", "NVIDIA H100", r"on NVIDIA H100 then, on CPU \(\d+ threads?\) now", SCENE),
        ("device processes", 8, r"on 8 then, on 1 now", SCENE),
        ("plan use_batched_cfg", True, r"--use_batched_cfg on then, off now", SCENE),
        ("plan offload_model", False, r"--offload_model off then, on now", SAME),
        ("plan vae_cpu", True, r"--vae_cpu on then, off now", SAME),
        ("plan from_the_future", 3, None, SAME),
        ("result decode", "whole", None, SAME),
        ("result decode", "in tiles of 256 pixels", r"decoded in tiles of 256 pixels then, as memory ran out", SCENE),
        ("flags base_seed", 4, None, ANOTHER),
        ("flags noise_device", "cuda", r"noise drawn on cuda then, on cpu now", ANOTHER),
        ("flags fps", 24, None, SAME),
        ("weights vae", {"file": "x", "hash": "sha256:2"}, r"other weights of vae: '/mine/vae\.pth' now", ANOTHER),
        ("weights t5", {"file": "x", "hash": "sha256:3"}, None, SAME),
    ],
)
def test_each_difference_is_a_line_and_decides_what_can_be_expected(
    path: str, value: Any, line: str | None, verdict: str
) -> None:
    now = changed(record_of([*DUMMY, "--seed", "7"]), "weights vae", {"file": "/mine/vae.pth", "hash": "sha256:1"})
    *lines, last = differences(changed(now, path, value), now)
    assert last.startswith(verdict)
    assert len(lines) == (line is not None)
    assert line is None or re.fullmatch(line, lines[0]), lines


def test_tiles_that_were_asked_for_are_no_rescue() -> None:
    now = record_of([*DUMMY, "--vae_tiling"])
    assert differences(changed(now, "result decode", "in tiles of 256 pixels"), now) == [SAME]
