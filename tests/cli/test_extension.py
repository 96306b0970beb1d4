"""`--use_prompt_extend`: which prompt makes the video, what is kept of both, and that no failure costs the video."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import wan
from wan.cli.generate import main
from wan.configs import WAN_CONFIGS
from wan.utils import prompt_extend
from wan.utils.prompt_extend import PromptOutput
from wan.video import read_metadata


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder and keeps the environment as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("DASH_API_KEY", None)
    return tmp_path


@pytest.fixture
def tiny(tiny_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that make an image in a fraction of a second."""
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    task = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint), "--device", "cpu", "--seed", "2"]
    return [*task, "--sample_steps", "2", "--size", "32x16", "--any_size", "--frame_num", "1"]


@pytest.fixture
def extend(tiny: list[str], chat_models: Path) -> list[str]:
    """The same with a prompt that a tiny model extends."""
    model = ["--prompt_extend_model", str(chat_models / "blind"), "--prompt_extend_target_lang", "en"]
    return [*tiny, "--prompt", "a fox", "--use_prompt_extend", *model]


class Writer:
    """Stands in for a language model: says what it was asked, or fails."""

    asked: list[tuple[str, dict[str, Any]]]
    made: list[dict[str, Any]]
    closed: int
    fails: bool

    def __init__(self, **who: Any) -> None:
        self.made.append(who)

    def __call__(self, prompt: str, **how: Any) -> PromptOutput:
        self.asked.append((prompt, how))
        if self.fails:
            return PromptOutput(False, prompt, how["seed"], "", "it has no idea")
        return PromptOutput(True, f"{prompt}, long", how["seed"], "", "")

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Writer]]:
    fresh = type("Fresh", (Writer,), {"asked": [], "made": [], "closed": 0, "fails": False})
    monkeypatch.setattr(prompt_extend, "QwenPromptExpander", fresh)
    yield fresh


def record(path: Path) -> dict[str, Any]:
    made = json.loads(read_metadata(path)["comment"])
    assert made == {**json.loads(path.with_name(f"{path.name}.json").read_text()), **made}
    return dict(made)


def only_image() -> Path:
    (path,) = Path().glob("*.png")
    return path


# Which prompt makes the video ----------------------------------------------------------------------------------------


def test_the_extended_prompt_makes_the_video_names_it_and_stands_in_the_record(
    extend: list[str], tiny: list[str], chat_models: Path, capsys: Any
) -> None:
    assert main(extend) == 0
    path, err = only_image(), capsys.readouterr().err
    made = record(path)
    before, prompt = made["prompt_extension"], made["flags"]["prompt"]
    assert before == {
        "prompt": "a fox", "method": "local_qwen", "model": str(chat_models / "blind"), "language": "en", "seed": 2,
    }  # fmt: skip
    assert prompt not in ("", "a fox") and not {"use_prompt_extend", "prompt_extend_model"} & made["flags"].keys()
    assert re.fullmatch(rf"t2v-A14B_32x16_1_{prompt[:50]}_\d+_\d+\.png", path.name)
    assert f"prompt  {prompt!r} (extended by " in err and "prompt  'a fox' (--prompt)" in err
    assert err.index("extend prompt ...") < err.index("extended by ") < err.index("load ")
    assert list(Path().glob("*.run")) == []

    # The same pixels as from that prompt spelled out, and others than from the short one.
    assert main([*tiny, "--prompt", prompt, "--save_file", "spelled.png"]) == 0
    assert main([*tiny, "--prompt", "a fox", "--save_file", "short.png"]) == 0
    files = {name: pixels(Path(name)) for name in ("spelled.png", "short.png")}
    assert torch.equal(pixels(path), files["spelled.png"]) and not torch.equal(pixels(path), files["short.png"])


def pixels(path: Path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(Image.open(path).convert("RGB")))


def test_a_record_is_repeated_without_asking_again(
    tiny: list[str], writer: type[Writer], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*tiny, "--prompt", "a fox", "--use_prompt_extend", "--save_file", "first.png"]) == 0
    assert main(["--from", "first.png", "--device", "cpu", "--save_file", "again.png"]) == 0
    assert main(["--from", "first.png", "--device", "cpu", "--save_file", "asked.png", "--use_prompt_extend"]) == 0
    assert len(writer.asked) == 1
    assert "note: the prompt is not extended: it was extended when the video was first made" in capsys.readouterr().err
    assert (pixels(Path("first.png")) == pixels(Path("again.png"))).all()
    for name in ("again.png", "asked.png"):
        made = record(Path(name))
        assert made["flags"]["prompt"] == "a fox, long" and made["prompt_extension"]["prompt"] == "a fox"

    assert main(["--from", "first.png", "--device", "cpu", "--save_file", "new.png", "--prompt", "a dog"]) == 0
    assert "prompt_extension" not in record(Path("new.png"))
    more = ["--prompt", "a dog", "--use_prompt_extend", "--save_file", "newer.png"]
    assert main(["--from", "first.png", "--device", "cpu", *more]) == 0
    assert record(Path("newer.png"))["flags"]["prompt"] == "a dog, long"


def test_an_interrupted_run_goes_on_with_the_prompt_it_began_with(
    tiny: list[str], writer: type[Writer], capsys: Any
) -> None:
    several = [*tiny, "--prompt", "a fox", "--state_every", "1"]
    assert main([*several, "--use_prompt_extend", "--save_file", "clip.png", "--timeout_s", "1e-9"]) == 4
    assert "--resume 'clip.png.run'" in capsys.readouterr().err
    assert main(["--resume", "clip.png.run", "--device", "cpu", "--use_prompt_extend"]) == 0
    assert "note: the prompt is not extended: it was extended when" in capsys.readouterr().err
    assert len(writer.asked) == 1
    made = record(Path("clip.png"))
    assert made["flags"]["prompt"] == "a fox, long" and made["prompt_extension"]["prompt"] == "a fox"

    assert main([*several, "--save_file", "plain.png", "--timeout_s", "1e-9"]) == 4
    capsys.readouterr()
    assert main(["--resume", "plain.png.run", "--device", "cpu", "--use_prompt_extend"]) == 0
    assert "note: the prompt is not extended: a run goes on with what it began with" in capsys.readouterr().err
    assert len(writer.asked) == 1


def test_who_extends_is_told_what_the_command_line_says(tiny: list[str], writer: type[Writer]) -> None:
    assert main([*tiny, "--prompt", "a fox", "--use_prompt_extend", "--offline", "--name", "{prompt}"]) == 0
    (who,), ((prompt, how),) = writer.made, writer.asked
    assert (who["model_name"], who["task"], who["is_vl"], who["offline"]) == (
        "Qwen/Qwen2.5-14B-Instruct", "t2v-A14B", False, True,
    )  # fmt: skip
    assert who["device"] == torch.device("cpu")
    assert (prompt, how) == ("a fox", {"tar_lang": "zh", "image": None, "seed": 2})
    assert only_image().name == "a_fox,_long.png"
    assert writer.closed == 1


def test_the_language_model_is_gone_before_the_videos_weights_come(
    tiny: list[str], writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []

    class Pipeline:
        def __init__(self, **arguments: Any) -> None:
            closed.append(writer.closed)

        def generate(self, prompt: str, **arguments: Any) -> torch.Tensor:
            assert prompt == "a fox, long"
            return torch.zeros(3, 1, 16, 32)

    monkeypatch.setitem(vars(wan), "WanT2V", Pipeline)
    assert main([*tiny, "--prompt", "a fox", "--use_prompt_extend"]) == 0
    assert closed == [1]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--task", "i2v-14B", "--image", "first.png"], "first.png"),
        (["--task", "i2v-A14B", "--image", "first.png", "--last_frame", "last.png"], ["first.png", "last.png"]),
        (["--task", "flf2v-14B", "--last_frame", "last.png", "--first_frame", "first.png"], ["first.png", "last.png"]),
        (["--task", "vace-1.3B", "--src_ref_images", "last.png,first.png"], ["last.png", "first.png"]),
        (["--task", "t2v-1.3B"], None),
    ],
)
def test_pictures_of_a_task_are_shown_in_their_order(
    flags: list[str], shown: Any, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    class Pipeline:
        device = torch.device("cpu")

        def __init__(self, **arguments: Any) -> None:
            pass

        def generate(self, prompt: str, *pictures: Any, last_frame: Any = None, **arguments: Any) -> torch.Tensor:
            prompts.append(prompt)
            return torch.zeros(3, 5, 48, 80)

        def prepare_source(self, *sources: Any) -> Any:
            return None, None, None

    for name in ("WanI2V", "WanFLF2V", "WanVace", "WanT2V"):
        monkeypatch.setitem(vars(wan), name, Pipeline)
    for name in ("first.png", "last.png"):
        Image.new("RGB", (80, 48), "red").save(name)
    short = ["--load_format", "dummy", "--device", "cpu", "--size", "480p", "--frame_num", "5", "--save_file", "a.mp4"]
    assert main([*flags, *short, "--prompt", "a fox" if shown is None else "", "--use_prompt_extend"]) == 0
    (who,), ((prompt, how),) = writer.made, writer.asked
    seen = how["image"] if isinstance(how["image"], list) else [how["image"]]
    expected = shown if isinstance(shown, list) else [shown]
    assert [each and Path(each).name for each in seen] == expected
    assert isinstance(how["image"], list) == isinstance(shown, list)
    assert who["is_vl"] == (shown is not None)
    assert who["model_name"] == f"Qwen/Qwen2.5-{'14B' if shown is None else 'VL-7B'}-Instruct"
    assert prompts == [f"{prompt}, long"]


def test_nothing_is_asked_before_all_checks_or_for_a_plan(tiny: list[str], writer: type[Writer], capsys: Any) -> None:
    asks = [*tiny, "--prompt", "a fox", "--use_prompt_extend"]
    for wrong in (["--sample_steps", "0"], ["--save_file", "clip.avi"], ["--name", "{nothing}"], ["--crf", "99"]):
        assert main([*asks, *wrong]) == 2
    capsys.readouterr()
    assert main([*asks, "--print_plan"]) == 0
    assert "extend  the prompt by Qwen/Qwen2.5-14B-Instruct (local_qwen), in zh\n" in capsys.readouterr().err
    assert writer.made == [] and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt_extend_method", "qwen"], "--prompt_extend_method.*'qwen'.*dashscope.*local_qwen"),
        (["--prompt_extend_target_lang", "de"], "--prompt_extend_target_lang.*'de'.*zh.*en"),
    ],
)
def test_a_value_that_is_none_is_refused(tiny: list[str], flags: list[str], says: str, capsys: Any) -> None:
    assert main([*tiny, "--use_prompt_extend", *flags]) == 2
    assert re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", capsys.readouterr().err)


def test_flags_without_their_switch_are_named(tiny: list[str], capsys: Any) -> None:
    assert main([*tiny, "--prompt_extend_model", "Qwen2.5_3B"]) == 0
    assert "note: --prompt_extend_model has no effect without --use_prompt_extend" in capsys.readouterr().err


# Failures ------------------------------------------------------------------------------------------------------------

WARNING = "\nwarning: the prompt could not be extended, the video is made from it as it is: "


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt_extend_model", "nobody/has-this"], "'nobody/has-this' is not in the Hugging Face cache"),
        (["--prompt_extend_model", "Qwen2.5_3B"], "'Qwen/Qwen2.5-3B-Instruct' is not in the Hugging Face cache"),
        (["--prompt_extend_model", "."], ""),
        (
            ["--prompt_extend_method", "dashscope"],
            "there is no key for DashScope: set the environment variable",
        ),
    ],
)
def test_a_failure_costs_a_warning_and_the_users_prompt_makes_the_video(
    tiny: list[str], flags: list[str], says: str, capsys: Any
) -> None:
    assert main([*tiny, "--prompt", "a fox", "--use_prompt_extend", *flags]) == 0
    assert f"{WARNING}{says}" in (err := capsys.readouterr().err), err
    path = only_image()
    assert "_a_fox_" in path.name
    made = record(path)
    assert made["flags"]["prompt"] == made["prompt_extension"]["prompt"] == "a fox"
    assert says in made["prompt_extension"]["failed"]


def test_a_service_that_cannot_be_reached_costs_a_warning_and_never_the_key(tiny: list[str], capsys: Any) -> None:
    asks = [*tiny, "--prompt", "a fox", "--use_prompt_extend", "--prompt_extend_method", "dashscope"]
    os.environ.update(DASH_API_KEY="sk-secret", DASH_API_URL="http://example.com/api/v1")
    assert main(asks) == 0
    err = capsys.readouterr().err
    assert f"{WARNING}DASH_API_URL 'http://example.com/api/v1' must begin with https://" in err
    path = only_image()
    assert "sk-secret" not in err + json.dumps(record(path))
    assert record(path)["prompt_extension"]["model"] == "qwen-plus"


# Queues --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(tiny: list[str]) -> Callable[..., list[str]]:
    def write(*prompts: str) -> list[str]:
        Path("jobs.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        return [*tiny, "--prompt_file", "jobs.txt", "--save_file", "out/", "--name", "{prompt}", "--use_prompt_extend"]

    return write


def test_the_lines_of_a_file_are_extended_by_one_model_each_with_its_own_seed(
    queue: Callable[..., list[str]], writer: type[Writer], capsys: Any
) -> None:
    assert main(queue("a fox", "a dog", "a bird")) == 0
    assert [(prompt, how["seed"]) for prompt, how in writer.asked] == [("a fox", 2), ("a dog", 3), ("a bird", 4)]
    assert len(writer.made) == writer.closed == 1
    names = sorted(path.name for path in Path("out").glob("*.png"))
    assert names == ["a_bird,_long.png", "a_dog,_long.png", "a_fox,_long.png"]
    err = capsys.readouterr().err
    assert err.rindex("(extended by") < err.index("load ")
    assert record(Path("out/a_dog,_long.png"))["prompt_extension"]["prompt"] == "a dog"


@pytest.mark.slow
def test_a_queue_started_again_asks_only_for_what_is_not_made(
    queue: Callable[..., list[str]], writer: type[Writer], capsys: Any
) -> None:
    assert main(queue("a fox", "a dog")) == 0
    assert main(queue("a fox", "a dog")) == 0
    assert len(writer.asked) == 2 and "2 made before" in capsys.readouterr().err
    assert main(queue("a fox", "a dog", "a bird")) == 0
    assert [prompt for prompt, _ in writer.asked[2:]] == ["a bird"]
    assert main([word for word in queue("a fox") if word != "--use_prompt_extend"]) == 0
    assert Path("out/a_fox.png").is_file()  # not asked for before: another video


@pytest.mark.slow
def test_a_job_of_a_queue_goes_on_with_the_prompt_it_began_with(
    queue: Callable[..., list[str]], writer: type[Writer]
) -> None:
    several = [*queue("a fox"), "--state_every", "1"]
    assert main([*several, "--timeout_s", "1e-9"]) == 4
    assert Path("out/a_fox,_long.png.run").is_dir() and len(writer.asked) == 1
    assert main(several) == 0
    assert len(writer.asked) == 1
    assert record(Path("out/a_fox,_long.png"))["prompt_extension"]["prompt"] == "a fox"
    assert [path.name for path in Path("out").glob("*.png")] == ["a_fox,_long.png"]


def test_a_queue_stops_asking_after_three_failures_and_makes_all_videos(
    queue: Callable[..., list[str]], writer: type[Writer], capsys: Any
) -> None:
    writer.fails = True
    assert main(queue("one", "two", "three", "four", "five")) == 0
    assert [prompt for prompt, _ in writer.asked] == ["one", "two", "three"]
    assert capsys.readouterr().err.count(f"{WARNING}it has no idea") == 5
    assert len(list(Path("out").glob("*.png"))) == 5
