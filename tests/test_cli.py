"""`generate.py` from the user's side: what it makes, what it refuses, what it says, and that nothing is lost."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wan
from wan.cli import env
from wan.cli.generate import main
from wan.cli.record import sidecar_path
from wan.cli.report import Terminal, clock_time
from wan.configs import WAN_CONFIGS
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.types import Step
from wan.video import verify_video

DUMMY = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu"]
CPU = Hardware(device=torch.device("cpu"), name="CPU")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder and keeps the environment as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return tmp_path


class Recorder:
    """Stands in for a pipeline class: keeps the calls, makes a moving gradient."""

    calls: list[tuple[str, dict[str, Any]]] = []
    error: BaseException | None = None

    def __init__(self, **arguments: Any) -> None:
        type(self).calls.append(("init", arguments))

    def generate(self, prompt: str, **arguments: Any) -> torch.Tensor:
        type(self).calls.append(("generate", {"prompt": prompt, **arguments}))
        if self.error is not None:
            raise self.error
        width, height = arguments["size"]
        ramp = torch.linspace(-1, 1, width).expand(3, arguments["frame_num"], height, width)
        return ramp * torch.linspace(1, 0.5, arguments["frame_num"])[None, :, None, None]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    fresh = type("Recorder", (Recorder,), {"calls": []})
    monkeypatch.setitem(vars(wan), "WanT2V", fresh)
    return fresh


@pytest.fixture
def tiny(tiny_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that run a whole generation in a second."""
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    task = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint)]
    return [*task, "--sample_steps", "2", "--any_size", "--seed", "1", "--device", "cpu"]


# What is refused -----------------------------------------------------------------------------------------------------

REFUSED = [
    ([], r"--ckpt_dir is missing.*hf download.*--task t2v-demo"),
    (["--task", "t2v-14B"], r"pass the folder of the t2v-14B checkpoint.*Wan-AI/Wan2\.1-T2V-14B.*--task t2v-demo"),
    (["--task", "t2v-99B"], r"--task 't2v-99B' is unknown; use one of .*t2v-A14B"),
    (["--task", "i2v-14B"], r"--image is missing: i2v-14B makes a video that begins with a picture"),
    (["--task", "i2v-demo"], r"--image is missing: i2v-demo makes a video that begins with a picture"),
    (["--task", "t2v-14B", "--ckpt_dir", "nowhere"], r"--ckpt_dir 'nowhere' is not a folder"),
    ([*DUMMY, "--size", "720p"], r"--size '720p'.*480\*832, 832\*480; the nearest is 832\*480.*--any_size"),
    ([*DUMMY, "--size", "huge"], r"size 'huge' is not WIDTH\*HEIGHT.*1280x720.*720p"),
    ([*DUMMY, "--size", "1000x600", "--any_size"], r"multiples of 16; the nearest is 992x592"),
    ([*DUMMY, "--frame_num", "80"], r"--frame_num: 80 frames.*4n\+1; the nearest are 77 and 81"),
    ([*DUMMY, "--frame_num", "0"], r"0 frames.*the nearest is 1"),
    ([*DUMMY, "--frame_num", "33", "--duration", "5"], r"--frame_num 33 and --duration 5 \(81 frames.*contradict"),
    ([*DUMMY, "--duration", "-1"], r"--duration -1\.0: give a number of seconds"),
    ([*DUMMY, "--duration", "nan"], r"--duration nan"),
    ([*DUMMY, "--sample_steps", "0"], r"--sample_steps 0: it must be greater than 0"),
    ([*DUMMY, "--sample_shift", "-3"], r"--sample_shift -3\.0"),
    ([*DUMMY, "--sample_guide_scale", "inf"], r"--sample_guide_scale inf: give finite numbers"),
    ([*DUMMY, "--sample_guide_scale", "3,4"], r"one expert, so give one number"),
    ([*DUMMY, "--base_seed", str(2**64)], r"the largest seed is 18446744073709551615"),
    ([*DUMMY, "--fps", "0"], r"--fps 0: it must be greater than 0"),
    ([*DUMMY, "--crf", "99"], r"crf=99 .*0 \(lossless\) to 51"),
    ([*DUMMY, "--save_file", "clip.avi"], r"'clip\.avi'.*\.mp4"),
    ([*DUMMY, "--save_file", "clip.png"], r"is an image and 81 frames"),
    ([*DUMMY, "--save_file", "/proc/there/clip.mp4"], r"--save_file: cannot write into '/proc/there'"),
    ([*DUMMY[:-2], "--device", "tpu9"], r"--device 'tpu9' is not a device"),
    ([*DUMMY[:-2], "--device", "meta"], r"--device 'meta': use cpu, cuda or cuda:N"),
    (
        [*DUMMY, "--vae_tiling", "--vae_tile_size", "8"],
        r"VAE tiles of 8 .* 8 .*--vae_tile_overlap.* less than --vae_tile_size;",
    ),
    ([*DUMMY, "--preset", "quick"], r"--preset 'quick' is unknown: use none, auto.*cpu.*FILE\.toml"),
    ([*DUMMY, "--preset", "mine.toml"], r"--preset 'mine\.toml': there is no such file"),
    (["--task", "t2i-14B", "--load_format", "dummy", "--frame_num", "5"], r"t2i-14B makes one image"),
    (["--image", "cat.png"], r"--image: t2v-A14B has no use for it \(it takes a text alone\)"),
    (["--ulysses_size", "2"], r"--ulysses_size 2: running on several GPUs.*leave the flag out"),
]


@pytest.mark.parametrize(
    ("argv", "says"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_bad_request_ends_with_status_2_and_one_line_before_anything_is_loaded(
    argv: list[str], says: str, recorder: type[Recorder], capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    started = time.perf_counter()
    assert main(argv) == 2
    assert time.perf_counter() - started < 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]*\n", err), err
    assert re.search(says, err), err
    assert recorder.calls == [] and list(elsewhere.iterdir()) == []


def test_several_processes_are_refused_while_nothing_can_share_the_work(capsys: Any) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="4", LOCAL_RANK="0")
    if any(o in {"ulysses_size", "dit_fsdp"} for cls in registry() for o in cls.__dataclass_fields__):
        pytest.skip("this version can share the work")
    assert main(DUMMY) == 2
    assert "WORLD_SIZE is 4, but this version runs in one process" in capsys.readouterr().err
    os.environ["RANK"] = "1"
    assert main(DUMMY) == 2
    assert capsys.readouterr().err == ""


# What is called ------------------------------------------------------------------------------------------------------


def test_the_class_in_wan_is_called_with_upstreams_arguments(recorder: type[Recorder], capsys: Any) -> None:
    argv = [*DUMMY, "--prompt", "a cat", "--frame_num", "5", "--seed", "7", "--save_file", "out.mp4", "--t5_cpu"]
    assert main([*argv, "--size", "480*832", "--sample_solver", "dpm++"]) == 0
    (_, init), (_, generate) = recorder.calls
    upstreams = {"t5_fsdp": False, "dit_fsdp": False, "use_sp": False, "t5_cpu": True, "convert_model_dtype": False}
    assert init["config"] is WAN_CONFIGS["t2v-1.3B"]
    assert {"device_id": 0, "rank": 0, "checkpoint_dir": None, **upstreams}.items() <= init.items()
    assert init["load_format"] == "dummy" and init["device"] == "cpu"
    assert generate == {
        "prompt": "a cat", "size": (480, 832), "frame_num": 5, "shift": 5.0, "sample_solver": "dpm++",
        "sampling_steps": 50, "guide_scale": 5.0, "seed": 7, "offload_model": True,
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert out == "out.mp4\n"
    assert "t5_cpu=True (flag)" in err and "seed 7 (--base_seed)" in err


def test_a_class_with_upstreams_exact_signature_works(
    monkeypatch: pytest.MonkeyPatch, tiny: list[str], capsys: Any
) -> None:
    made = []

    class WanT2V:
        def __init__(  # noqa: PLR0913
            self, config, checkpoint_dir, device_id=0, rank=0, t5_fsdp=False, dit_fsdp=False, use_sp=False,
            t5_cpu=False, init_on_cpu=True, convert_model_dtype=False,
        ) -> None:  # fmt: skip
            made.append(checkpoint_dir)

        def generate(  # noqa: PLR0913
            self, input_prompt, size=(1280, 720), frame_num=81, shift=5.0, sample_solver="unipc", sampling_steps=50,
            guide_scale=5.0, n_prompt="", seed=-1, offload_model=True,
        ) -> torch.Tensor:  # fmt: skip
            return torch.zeros(3, frame_num, size[1], size[0])

    monkeypatch.setitem(vars(wan), "WanT2V", WanT2V)
    tiny = [token for token in tiny if token not in ("--device", "cpu")]
    small = [*tiny, "--size", "32x16", "--frame_num", "5", "--save_file", "out.mp4"]
    assert main(small) == 0
    assert made and Path("out.mp4").is_file()
    # What such a class cannot do is refused, never dropped.
    assert main([*small, "--tf32"]) == 2
    assert "does not take optimizations" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["t2v-1.3B", "t2v-14B", "t2i-14B", "t2v-A14B"])
def test_a_task_without_flags_gets_the_values_upstreams_program_gives_it(
    task: str, recorder: type[Recorder], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = json.loads((root / "tests" / "data" / "upstream_flags.json").read_text())["used"][task]
    monkeypatch.setattr("wan.cli.generate.save", lambda job, video: None)
    monkeypatch.setattr(Recorder, "generate", lambda self, prompt, **kw: recorder.calls.append(("generate", kw)) or 0)
    assert main(["--task", task, "--load_format", "dummy"]) == 0
    call = recorder.calls[1][1]
    scale = tuple(used["guide_scale"]) if isinstance(used["guide_scale"], list) else used["guide_scale"]
    assert call["guide_scale"] == scale and call["sampling_steps"] == used["steps"] and call["shift"] == used["shift"]
    assert call["frame_num"] == used["num_frames"] and call["sample_solver"] == used["solver"]
    assert call["size"] == ((832, 480) if task == "t2v-1.3B" else (1280, 720))
    assert call["seed"] >= 0 and call["offload_model"] is True and "n_prompt" not in call


def test_duration_becomes_frames_at_the_frame_rate(recorder: type[Recorder], capsys: Any) -> None:
    small = ["--size", "16x16", "--any_size", "--save_file", "clip.mp4"]
    assert main([*DUMMY, *small, "--duration", "1"]) == 0
    assert main([*DUMMY, *small, "--duration", "1", "--fps", "24"]) == 0
    assert [call["frame_num"] for name, call in recorder.calls if name == "generate"] == [17, 25]
    assert verify_video("clip.mp4").fps == 24
    assert "(--duration 1 at 24 frames per second)" in capsys.readouterr().err


def test_a_drawn_seed_is_printed_and_used(recorder: type[Recorder], capsys: Any) -> None:
    small = [*DUMMY, "--size", "16x16", "--any_size", "--frame_num", "1", "--save_file", "a.png"]
    assert main(small) == main(small) == 0
    seeds = [call["seed"] for name, call in recorder.calls if name == "generate"]
    printed = re.findall(r"seed (\d+) \(drawn\)", capsys.readouterr().err)
    assert printed == [str(seed) for seed in seeds] and seeds[0] != seeds[1]


# What is made --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "frames"), [("16x16", 5), ("48x32", 1), ("32x80", 9), ("64x16", 13)])
def test_a_legal_size_runs_and_is_what_the_file_holds(tiny: list[str], size: str, frames: int) -> None:
    out = Path("clip.mp4")
    assert main([*tiny, "--size", size, "--frame_num", str(frames), "--save_file", str(out), "--fps", "12"]) == 0
    found = verify_video(out)
    assert (f"{found.width}x{found.height}", found.frames, found.fps) == (size, frames, 12)
    assert sorted(Path().iterdir()) == [out, sidecar_path(out)]


def test_one_command_line_works_for_the_optimised_class_too(tiny: list[str], monkeypatch: Any, capsys: Any) -> None:
    argv = [*tiny, "--size", "32x32", "--frame_num", "5", "--save_file", "plain.mp4"]
    assert main(argv) == 0
    monkeypatch.setitem(vars(wan), "WanT2V", wan.WanT2VOptimized)
    assert main([*argv[:-1], "optimised.mp4"]) == 0
    assert verify_video("optimised.mp4") == verify_video("plain.mp4")
    assert capsys.readouterr().out.split() == ["plain.mp4", "optimised.mp4"]


def test_the_optimised_program_without_a_preset_and_in_its_careful_call_makes_the_same_file(
    tiny: list[str], programs_agree: Callable[[list[str]], None]
) -> None:
    programs_agree([*tiny, "--size", "32x32", "--frame_num", "5"])


def test_one_frame_without_a_name_is_an_image_named_by_upstreams_rule(tiny: list[str], capsys: Any) -> None:
    assert main([*tiny, "--size", "32x16", "--frame_num", "1", "--prompt", "a/b: c?", "--save_file", "made/"]) == 0
    [made] = Path("made").glob("*.png")
    assert re.fullmatch(r"t2v-A14B_32x16_1_a_b__c__\d{8}_\d{6}\.png", made.name), made.name
    assert capsys.readouterr().out.strip() == str(made)


def test_the_same_seed_makes_the_same_file(tiny: list[str]) -> None:
    for name in ("a.png", "b.png"):  # what a file says about itself has the time in it
        assert main([*tiny, "--size", "32x32", "--frame_num", "1", "--save_file", name, "--no_metadata"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_start_progress_and_end_are_told_on_stderr(tiny: list[str], capsys: Any) -> None:
    assert (
        main([*tiny, "--size", "32x32", "--frame_num", "5", "--save_file", "a.mp4", "--sample_guide_scale", "2"]) == 0
    )
    err = capsys.readouterr().err
    for line in (
        r"task    t2v-A14B \(--task\) from .*Tiny",
        r"prompt  '.*' \(example, as there is no --prompt\)",
        r"video   32x32 \(--size 32x32\), 5 frames \(--frame_num\) at 16 fps = 0\.3 s",
        r"sample  2 steps of unipc, shift 12, guidance 2, seed 1 \(--base_seed\)",
        r"run     on CPU .*offload_model=True \(default for one process\)",
        r"step 2/2  [\d.]+ s/it  ETA 0:00",
        r"times   .*decode [\d.]+ s.*save [\d.]+ s; [\d.]+ s in all",
        r"saved   a\.mp4",
        r"note: attention of high: sdpa \(.*\)",
    ):
        assert re.search(line, err), line


def demo() -> Path:
    folder = Path(__file__).resolve().parent.parent / "demo"
    if not (folder / "high_noise_model" / "config.json").is_file():
        pytest.skip("the demo model is not there yet")
    return folder


def test_the_demo_needs_nothing_but_its_name(root: Path) -> None:
    """The one test through the real script, in a process and a folder of its own."""
    demo()
    argv = [sys.executable, str(root / "generate.py"), "--task", "t2v-demo", "--device", "cpu", "--seed", "3"]
    run = subprocess.run([*argv, "--sample_steps", "4"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = verify_video(run.stdout.strip())
    config = WAN_CONFIGS["t2v-demo"]
    assert found == (config.frame_num, 96, 96, config.sample_fps)


# Nothing is lost -----------------------------------------------------------------------------------------------------

SMALL = [*DUMMY, "--size", "16x16", "--any_size", "--frame_num", "5", "--save_file", "clip.mp4"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("encoder died"), None])
def test_a_failed_save_keeps_the_frames_and_ends_with_status_3(
    error: Exception | None, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(**arguments: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("wan.utils.utils.save_video", broken)
    assert main(SMALL) == 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and (str(error) if error else "'clip.mp4' was not written") in err
    kept = torch.load(re.search(r"kept in '([^']+)'", err)[1], weights_only=True)
    assert kept.shape == (5, 16, 16, 3) and kept.dtype == torch.uint8 and kept.max() > kept.min()


def test_an_interruption_ends_with_status_130_and_no_traceback(recorder: type[Recorder], capsys: Any) -> None:
    recorder.error = KeyboardInterrupt()
    assert main(SMALL) == 130
    err = capsys.readouterr().err
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert list(Path().iterdir()) == []


def test_out_of_gpu_memory_says_what_to_try(recorder: type[Recorder], capsys: Any) -> None:
    recorder.error = torch.OutOfMemoryError("CUDA out of memory")
    assert main([*SMALL, "--no-offload"]) == 4
    assert re.search(r"out of GPU memory.*--offload_model True.*a smaller --size", capsys.readouterr().err)


# What is said, and how fast ------------------------------------------------------------------------------------------


def steps(terminal: Terminal, count: int) -> None:
    terminal.stage("denoise")
    for index in range(count):
        step = Step(index=index, count=count, t=0, sigma=0, sigma_next=0, expert="low")
        terminal.step(step, 2.0 if index else 60.0, 1.0, count - index - 1.0)


def test_a_log_file_gets_ten_lines_of_progress_with_time_left() -> None:
    stream = io.StringIO()
    steps(Terminal(stream), 50)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11 and lines[1] == "  step 5/50  2.00 s/it  ETA 1:30  (low noise)"
    assert lines[-1].startswith("  step 50/50")


def test_steps_that_a_cache_answers_count_neither_for_the_pace_nor_for_the_time_left() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    terminal.stage("denoise")
    for index, (seconds, share, ahead) in enumerate([(9.0, 1, 2.0), (4.0, 1, 1.0), (0.0, 0, 1.0), (4.0, 1, 0.0)]):
        terminal.step(Step(index=index, count=4, t=0, sigma=0, sigma_next=0), seconds, share, ahead)
    lines = stream.getvalue().splitlines()
    assert lines[2:4] == ["  step 2/4  4.00 s/it  ETA 0:04", "  step 3/4  4.00 s/it  ETA 0:04  (reused)"]


def test_a_terminal_gets_one_line_redrawn() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    terminal = Terminal(stream)
    steps(terminal, 50)
    terminal.note("done")
    assert stream.getvalue().count("\r") == 50 and stream.getvalue().endswith("\nnote: done\n")


def test_times_add_up_the_stages_of_one_name() -> None:
    now = iter(range(10))
    terminal = Terminal(io.StringIO(), clock=lambda: float(next(now)))
    for name in ("denoise", "load low", "denoise"):
        terminal.stage(name)
    terminal.end_stage()
    assert terminal.times() == "denoise 2.0 s, load low 1.0 s; 3.0 s in all"
    assert [clock_time(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_help_ends_with_status_0_and_lists_the_flags(capsys: Any) -> None:
    assert main(["--help"]) == 0
    assert "--sample_guide_scale" in capsys.readouterr().out


def test_the_users_environment_wins() -> None:
    os.environ.update(OMP_WAIT_POLICY="ACTIVE", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    env.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "PYTORCH_ALLOC_CONF" not in os.environ
    del os.environ["OMP_WAIT_POLICY"], os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    env.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert sys.platform != "linux" or os.environ["PYTORCH_ALLOC_CONF"].startswith("expandable_segments:True,")


@pytest.mark.parametrize("release", ["5.15.167.4-microsoft-standard-WSL2", "5.10.120-tegra", "6.8.0-generic"])
def test_growing_segments_are_left_out_where_the_driver_has_none(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.release", lambda: release)
    for name in env.ALLOCATOR:
        os.environ.pop(name, None)
    env.prepare()
    chosen = {name: os.environ[name] for name in env.ALLOCATOR if name in os.environ}
    settings = "expandable_segments:True,garbage_collection_threshold:0.8"
    assert chosen == ({"PYTORCH_ALLOC_CONF": settings} if "generic" in release else {})


def test_torch_comes_after_the_environment_and_nothing_heavy_for_a_bad_flag(root: Path) -> None:
    code = (
        "import sys, wan.cli.generate, wan.cli.args, wan.cli.env; assert 'torch' not in sys.modules;"
        "status = wan.cli.generate.main(['--sieze', '1']);"
        "heavy = {'diffusers', 'transformers', 'PIL', 'imageio_ffmpeg'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(status)"
    )
    started = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr == "error: unknown flag --sieze: did you mean --size?\n", run.stderr
    assert time.perf_counter() - started < 20, "about 2 s on an idle machine, most of it importing torch"
