"""`--extend`: clips that go on from each other make a video of exactly the asked length, and none is made twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import wan
from wan.cli.generate import main
from wan.conditioning.clips import clip_lengths, part_of_clip
from wan.conditioning.image import ImageInputs, given_pictures
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadRequest
from wan.engine.types import Request
from wan.families.i2v import next_clip
from wan.runs import Run
from wan.video import verify_video

SMALL = {"size": (32, 32), "fit": "crop", "sampling_steps": 2, "shift": 3.0, "guide_scale": 4.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe(root: Path) -> Any:
    return wan.WanI2V(WAN_CONFIGS["i2v-demo"], root / "demo" / "i2v", device="cpu")


@pytest.fixture(scope="module")
def picture(root: Path) -> Image.Image:
    with Image.open(root / "demo" / "i2v" / "example.png") as image:
        return image.convert("RGB")


def request(total: int, **inputs: Any) -> Request:
    given = ImageInputs(first=Image.new("RGB", (32, 32), "red"), **inputs)
    return Request(
        task="i2v", prompt="it moves up | it moves down", negative_prompt="", height=32, width=32, num_frames=total,
        steps=2, shift=3.0, solver="unipc", guide_scale=(4.0, 4.0), seed=2**64 - 1, inputs=given,
    )  # fmt: skip


@pytest.mark.parametrize("shared", [1, 5, 9])
@pytest.mark.parametrize("longest", [13, 33, 81])
def test_clips_are_even_and_make_every_length_exactly(longest: int, shared: int) -> None:
    for total in range(1, 1026, 4):
        clips = clip_lengths(total, longest, shared)
        assert clips[0] + sum(clip - shared for clip in clips[1:]) == total
        assert all(clip <= longest and clip % 4 == 1 for clip in clips) and max(clips) - min(clips) <= 4
        assert len(clips) == 1 or total > longest


@pytest.mark.parametrize(
    ("total", "longest", "shared", "said"),
    [(41, 6, 1, "--extend 6"), (41, 17, 2, "--extend_overlap 2"), (41, 17, 17, "--extend_overlap 17")],
)
def test_lengths_that_cannot_be_are_refused(total: int, longest: int, shared: int, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        clip_lengths(total, longest, shared)


def test_a_clip_is_given_the_end_of_the_one_before_and_a_seed_of_its_own() -> None:
    """Seeds count up and go round at 2^64; only the last clip ends with the last picture."""
    asked = request(25, extend=13, extend_overlap=5, last=Image.new("RGB", (32, 32), "blue"))
    config, clips = SimpleNamespace(vae_stride=(4, 8, 8), get=lambda name, default: default), [13, 13, 9]
    carry = torch.rand(3, 5, 32, 32)
    assert asked.inputs.clips(25) == clips
    for index, length in enumerate(clips):
        shot = next_clip(asked, config, index, carry if index else None)
        assert shot is not None and shot.reseed == (2**64 - 1 + index) % 2**64
        assert shot.latent_shape == (16, (length - 1) // 4 + 1, 4, 4)
        assert (shot.trim.start, shot.anchor) == ((5, 2) if index else (0, 1))
        assert shot.carry_frames == (5 if index + 1 < len(clips) else 0)
        given = given_pictures(asked.inputs, asked, shot, clips)
        ends = {length - 1} if index == len(clips) - 1 else set()
        assert set(given) == (set(range(5)) if index else {0}) | ends
        if index:
            assert all(torch.equal(given[number], carry[:, number]) for number in range(5))
    assert next_clip(asked, config, len(clips), carry) is None
    assert [part_of_clip("a | b", clip, 5) for clip in range(5)] == ["a", "a", "a", "b", "b"]


def test_the_video_begins_with_the_first_clip_alone_and_has_its_length(pipe: Any, picture: Image.Image) -> None:
    whole = pipe.generate("it moves up", picture, frame_num=17, extend=9, **SMALL)
    first = pipe.generate("it moves up", picture, frame_num=9, **SMALL)
    assert whole.shape == (3, 17, 32, 32) and torch.equal(whole[:, :9], first)
    one = pipe.generate("it moves up", picture, frame_num=9, extend=9, **SMALL)
    assert torch.equal(one, first)


def test_clips_that_were_finished_survive_a_kill(pipe: Any, picture: Image.Image, tmp_path: Path) -> None:
    """The second clip is cut off in its last step; going on denoises that one and the third, to the same bits."""
    asked: dict[str, Any] = {"frame_num": 13, "extend": 5, **SMALL}
    straight, steps = pipe.generate("it grows", picture, **asked), []

    def stop(step: Any, latents: torch.Tensor) -> None:
        steps.append(step.index)
        if len(steps) == 4:
            raise KeyboardInterrupt

    run = Run(tmp_path / "clip.run", {}, every=1)
    run.begin()
    with pytest.raises(KeyboardInterrupt):
        pipe.generate("it grows", picture, keeper=run, observe=(stop,), **asked)
    run.release()
    steps.clear()
    again = Run(tmp_path / "clip.run", {}, every=1)
    again.begin()
    video = pipe.generate(
        "it grows", picture, keeper=again, observe=(lambda step, x: steps.append(step.index),), **asked
    )
    again.close()
    assert torch.equal(video, straight)
    assert steps[-2:] == [0, 1] and len(steps) in (3, 4)  # the state of the second clip's first step may be kept


def test_the_program_writes_all_clips_and_tells_their_colours(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    picture = str(root / "demo" / "i2v" / "example.png")
    made = "--task i2v-demo --size 32*32 --any_size --sample_steps 1 --frame_num 13 --extend 9 --match_color --seed 1"
    assert main([*made.split(), "--image", picture, "--save_file", str(out)]) == 0
    assert verify_video(out).frames == 13
    record = json.loads(out.with_name("clip.mp4.json").read_text("utf-8"))
    assert {"extend": 9, "extend_overlap": 1, "match_color": True}.items() <= record["flags"].items()
    clips = record["result"]["clips"]
    assert [(clip["first_frame"], clip["frames"], clip["matched"]) for clip in clips] == [(0, 9, False), (9, 4, True)]
    assert all(0 < value < 255 for clip in clips for value in clip["mean_rgb"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--extend", "6", "--frame_num", "41"], "--extend 6: "),
        (["--extend", "33", "--frame_num", "33"], "--extend 33: the 33 frames"),
        (["--extend", "17", "--extend_overlap", "17", "--frame_num", "41"], "--extend_overlap 17: "),
        (["--extend_overlap", "5"], "--extend_overlap is for clips: add --extend"),
        (["--match_color"], "--match_color is for clips: add --extend"),
        (["--task", "t2v-demo", "--extend", "33"], "--extend: t2v-demo has no use for it"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_anything_is_loaded(
    more: list[str], said: str, root: Path, capsys: Any
) -> None:
    argv = ["--task", "i2v-demo", "--image", str(root / "demo" / "i2v" / "example.png")]
    assert main(more if "--task" in more else [*argv, *more]) == 2
    err = capsys.readouterr().err
    assert said in err and "load" not in err
