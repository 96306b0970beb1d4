"""`--resume`, `--decode` and `--keep_latents`: what continues, what is refused, and that nothing kept is lost by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fault_setup import Driver, damage, frames, linked, listing

from wan.runs import Run

KILLED = -9
STATE = {"clip.png.run/lock", "clip.png.run/run.json", "clip.png.run/state.safetensors"}


@pytest.fixture
def interrupted(driver: Driver, tmp_path: Path) -> Path:
    """A folder with a run of clip.png, killed after its third step."""
    folder = tmp_path / "work"
    folder.mkdir()
    argv = [*driver.argv(video=False), "--save_file", "clip.png"]
    assert driver.run(argv, folder, ["step:3 kill"]).status == KILLED
    assert listing(folder) == STATE
    return folder


def stages(err: str) -> list[str]:
    return re.findall(r"^(\w[\w ]*?)(?::.*)? \.\.\.$", err, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "2"], "--seed 2 contradicts --resume 'clip.png', which has --base_seed 1"),
        (["--prompt", "a blue bird"], "--prompt .*contradicts --resume"),
        (["--sample_steps", "9"], "--sample_steps 9 contradicts --resume"),
        (["--sample_solver", "euler"], "--sample_solver euler contradicts --resume"),
        (["--param_dtype", "bfloat16"], "--param_dtype bfloat16 contradicts --resume"),
        (["--decode", "x.safetensors"], "--resume and --decode each name what to continue from"),
    ],
)
def test_run_does_not_go_on_as_another_one(driver: Driver, interrupted: Path, flags: list[str], says: str) -> None:
    ended = driver.run(["--resume", "clip.png", *flags], interrupted)
    assert ended.status == 2 and re.search(says, ended.err), ended.err
    assert listing(interrupted) == STATE and "load" not in stages(ended.err)


def test_run_does_not_go_on_with_other_weights(driver: Driver, interrupted: Path, tmp_path: Path) -> None:
    other = linked(driver.checkpoint, tmp_path / "checkpoint")
    damage(other / "low_noise_model" / "diffusion_pytorch_model.safetensors", "flipped")
    ended = driver.run(["--resume", "clip.png", "--ckpt_dir", str(other)], interrupted)
    assert ended.status == 2 and re.search("begun with other weights of low", ended.err), ended.err
    assert listing(interrupted) == STATE


def test_what_changes_no_bit_may_change_in_between(driver: Driver, interrupted: Path, straight: dict[str, str]) -> None:
    """As after running out of memory, which the advice answers with such flags."""
    ended = driver.run(["--resume", "clip.png.run", "--no-offload_model"], interrupted)
    assert ended.status == 0, ended.err
    assert "continuing after step 2 of 8" in ended.err
    assert frames(interrupted / "clip.png") == straight["clip.png"]


def test_run_that_is_not_there_is_said_so(driver: Driver, tmp_path: Path) -> None:
    for named in ("clip.png", "clip.png.run"):
        ended = driver.run(["--resume", named], tmp_path)
        assert ended.status == 2 and re.search(rf"--resume '{named}.*no run was left there", ended.err), ended.err
    (tmp_path / "clip.png").write_bytes(b"a picture")
    for named in ("clip.png", "clip.png.run"):
        ended = driver.run(["--resume", named], tmp_path)
        assert ended.status == 2 and "'clip.png' is finished, nothing is left to continue" in ended.err


def test_new_run_does_not_take_the_place_of_an_unfinished_one(driver: Driver, interrupted: Path) -> None:
    kept = (interrupted / "clip.png.run" / "state.safetensors").read_bytes()
    ended = driver.run([*driver.argv(video=False), "--save_file", "clip.png"], interrupted)
    assert ended.status == 2, ended.err
    assert "an unfinished run of it is kept in 'clip.png.run'; continue it with --resume 'clip.png.run'" in ended.err
    assert listing(interrupted) == STATE
    assert (interrupted / "clip.png.run" / "state.safetensors").read_bytes() == kept


def test_two_programs_do_not_work_in_one_folder(driver: Driver, interrupted: Path) -> None:
    run = Run(interrupted / "clip.png.run", {"flags": {}})
    record = (run.folder / "run.json").read_bytes()
    run.begin()  # in this process
    (run.folder / "run.json").write_bytes(record)
    ended = driver.run(["--resume", "clip.png"], interrupted)
    assert ended.status == 2 and re.search(r"another process \(\d+\) is at work in 'clip.png.run'", ended.err), (
        ended.err
    )
    assert listing(interrupted) == STATE
    run.release()
    assert driver.run(["--resume", "clip.png"], interrupted).status == 0  # a lock file alone stops nobody


def test_kept_latents_decode_to_the_same_frames_with_the_vae_alone(
    driver: Driver, tmp_path: Path, straight: dict[str, str]
) -> None:
    ended = driver.run([*driver.argv(), "--save_file", "clip.mp4", "--keep_latents"], tmp_path)
    latents = {"clip.latents.safetensors", "switch-clip.latents.safetensors"}
    assert ended.status == 0 and listing(tmp_path) == {"clip.mp4", "clip.mp4.json", *latents}, ended.err
    ended = driver.run(["--decode", "clip.latents.safetensors"], tmp_path)
    assert ended.status == 0, ended.err
    assert stages(ended.err) == ["load vae", "decode", "save"]
    again = Path(ended.out.strip())
    assert again.name != "clip.mp4", "which is there already"
    assert frames(tmp_path / again) == straight["clip.mp4"] == frames(tmp_path / "clip.mp4")
    assert latents <= listing(tmp_path)


def test_failed_decoding_leaves_the_latents_where_they_are(
    driver: Driver, tmp_path: Path, straight: dict[str, str]
) -> None:
    argv = [*driver.argv(video=False), "--save_file", "clip.png"]
    assert driver.run(argv, tmp_path, ["stage:decode ctrl-c"]).status == 130
    kept = listing(tmp_path)
    latents = "clip.png.run/latents-0.safetensors"
    for fault, status in (("chunk:1 oom always", 4), ("stage:load-vae term", 143), ("chunk:1 kill", KILLED)):
        ended = driver.run(["--decode", latents], tmp_path, [fault])
        assert ended.status == status and listing(tmp_path) == kept, ended.err
        assert status == KILLED or f"continue with --decode '{latents}'" in ended.err
    ended = driver.run(["--decode", latents], tmp_path)
    assert ended.status == 0 and listing(tmp_path) == {"clip.png", "clip.png.json"}, ended.err
    assert frames(tmp_path / "clip.png") == straight["clip.png"]


def test_latents_that_hold_nan_are_refused(driver: Driver, tmp_path: Path) -> None:
    argv = [*driver.argv(video=False), "--save_file", "clip.png", "--keep_latents"]
    assert driver.run(argv, tmp_path).status == 0
    damage(tmp_path / "clip.latents.safetensors", "nan")
    ended = driver.run(["--decode", "clip.latents.safetensors"], tmp_path)
    assert ended.status == 2 and re.search("clip.latents.safetensors' holds NaN", ended.err), ended.err


def test_forwards_are_counted_and_told(driver: Driver, tmp_path: Path) -> None:
    ended = driver.run([*driver.argv(video=False), "--save_file", "clip.png"], tmp_path)
    told = r"^ran     forwards high 6 uncond \+ 6 cond, low 2 uncond \+ 2 cond, as planned$"
    assert re.search(told, ended.err, flags=re.MULTILINE), ended.err


def test_queue_ended_by_signals_goes_on_with_the_same_command(
    driver: Driver, tmp_path: Path, straight: dict[str, str]
) -> None:
    """Ended while the first video gets its name, then in the middle of the second, then killed there."""
    (tmp_path / "prompts.txt").write_text("a red bird\na blue bird\n")
    alone = [*driver.argv(video=False, bird="blue", seed=2), "--save_file", "alone.png"]
    assert driver.run(alone, tmp_path).status == 0
    argv = [*driver.argv(video=False), "--prompt_file", "prompts.txt", "--name", "{index}"]
    del argv[argv.index("--prompt") : argv.index("--prompt") + 2]
    made = {"alone.png", "alone.png.json", "1.png", "1.png.json"}
    for fault, status in (("rename:1.png term", 143), ("step:4 ctrl-c", 130), ("step:7 kill", KILLED)):
        ended = driver.run(argv, tmp_path, [fault])
        assert ended.status == status, ended.err
        assert {name for name in listing(tmp_path) if name.endswith((".png", ".json"))} - {"2.png.run/run.json"} == made
        assert frames(tmp_path / "1.png") == straight["clip.png"]
    ended = driver.run(argv, tmp_path)
    assert ended.status == 0 and "continuing after step 6 of 8" in ended.err, ended.err
    assert {name for name in listing(tmp_path) if ".png" in name} == made | {"2.png", "2.png.json"}
    assert frames(tmp_path / "2.png") == frames(tmp_path / "alone.png")
