"""Prompts extended by a chat model on this machine: repeatable, with pictures, gone afterwards, never in the way."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from wan.prompting.system import system_prompt
from wan.utils.prompt_extend import PromptOutput, QwenPromptExpander


def expander(folder: Path, task: str | None = "t2v-A14B", *, is_vl: bool = False) -> QwenPromptExpander:
    return QwenPromptExpander(str(folder), task, "cpu", is_vl)


def test_the_text_is_the_seeds_and_nothing_else_notices(chat_models: Path) -> None:
    extend = expander(chat_models / "blind")
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    first = extend("a fox", tar_lang="en", seed=2)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert first.status and first.prompt and first.seed == 2
    assert first.prompt == " ".join(first.message.split())
    assert first.system_prompt == system_prompt("t2v-A14B", "en")
    assert extend("a fox", tar_lang="en", seed=2) == first
    assert expander(chat_models / "blind")("a fox", tar_lang="en", seed=2) == first
    assert extend("a fox", tar_lang="en", seed=3).prompt != first.prompt
    assert extend("a stone", tar_lang="en", seed=2).prompt != first.prompt
    assert extend("a fox", system_prompt="the stone", seed=2).system_prompt == "the stone"


def test_without_a_seed_one_is_drawn_and_told(chat_models: Path) -> None:
    extend = expander(chat_models / "blind")
    drawn = extend("a fox", tar_lang="en")
    assert drawn.seed >= 0
    assert extend("a fox", tar_lang="en", seed=drawn.seed).prompt == drawn.prompt
    assert extend("a fox", tar_lang="en", seed=2**64 - 1).status


def test_a_model_comes_with_the_first_prompt_and_leaves_with_close(
    chat_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    extend = expander(chat_models / "blind")
    assert not loaded
    assert extend("a fox", seed=2).status and extend("a stone", seed=2).status
    assert len(loaded) == 1 and loaded[0]() is not None
    extend.close()
    assert loaded[0]() is None
    assert extend("a fox", seed=2).status and len(loaded) == 2


def test_a_picture_is_seen(chat_models: Path) -> None:
    extend = expander(chat_models / "sees", "i2v-14B", is_vl=True)
    red, blue = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")
    texts = {
        tuple(extend("a fox", tar_lang="en", seed=seed, image=image).prompt for seed in (2, 3, 4))
        for image in (red, blue, [red, blue])
    }
    assert len(texts) == 3
    seen = extend("a fox", tar_lang="en", seed=2, image=red)
    assert seen.status and seen.prompt in {text for three in texts for text in three}
    assert seen.system_prompt == system_prompt("i2v-14B", "en", pictures=1)


def test_a_picture_without_words_and_words_without_a_picture_will_do(chat_models: Path) -> None:
    extend = expander(chat_models / "sees", "ti2v-5B", is_vl=True)
    wordless = extend("", tar_lang="zh", seed=2, image=Image.new("RGB", (64, 48), "red"))
    assert wordless.status and wordless.system_prompt == system_prompt("i2v-14B", "zh", pictures=1, words=False)
    assert extend("a fox", tar_lang="en", seed=2).system_prompt == system_prompt("t2v-14B", "en")
    nothing = extend(" ", seed=2)
    assert nothing == PromptOutput(False, " ", 2, "", "there is nothing to extend: the prompt is empty")


def test_a_model_without_eyes_is_told_of_the_picture_it_misses(
    chat_models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extend = expander(chat_models / "blind", "i2v-14B", is_vl=True)
    with caplog.at_level("INFO", "wan.prompting"):
        output = extend("a fox", tar_lang="en", seed=2, image=Image.new("RGB", (64, 48)))
    assert output.status
    assert output.system_prompt == system_prompt("i2v-14B", "en", unseen=True)
    assert "takes no pictures: the prompt is extended from its words alone" in caplog.text


def refused(output: PromptOutput, prompt: str = "a fox") -> str:
    assert not output.status and output.prompt == prompt
    return output.message


def test_whatever_fails_leaves_the_prompt_and_says_why(chat_models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_text("none")
    names = {
        "nobody/has-this-model": "is not in the Hugging Face cache, and downloads are off: name a folder",
        "no such thing": "is neither a folder nor OWNER/NAME of a model on Hugging Face",
        str(tmp_path / "empty"): "OSError|ValueError",
    }
    for name, why in names.items():
        message = refused(QwenPromptExpander(name, device="cpu")("a fox"))
        assert any(each in message for each in why.split("|")), message
        assert "\n" not in message
    extend = expander(chat_models / "sees", "i2v-14B", is_vl=True)
    assert "picture.png' is no picture" in refused(extend("a fox", image=str(tmp_path / "picture.png")))
    assert "in zh or en, not in 'de'" in refused(extend("a fox", tar_lang="de"))


def test_a_model_that_does_not_chat_or_never_ends_is_refused(
    save_chat_model: Callable[..., Path], tmp_path: Path
) -> None:
    mute = save_chat_model(tmp_path / "mute", template=False)
    assert "has no chat template" in refused(expander(mute)("a fox"))
    endless = save_chat_model(tmp_path / "endless", ends=False)
    assert refused(expander(endless)("a fox")) == "the answer did not come to its end within 512 tokens"


def test_damaged_weights_are_a_reason_not_a_crash(save_chat_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert refused(expander(folder)("a fox"))


def test_a_model_larger_than_memory_is_not_loaded(save_chat_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "huge")
    with (folder / "model-00002.safetensors").open("wb") as file:
        file.truncate(1 << 43)  # a hole of 8 TiB takes no room
    message = refused(expander(folder)("a fox"))
    assert "needs 8193.0 GiB of RAM to load" in message and "smaller model with --prompt_extend_model" in message


def test_a_number_is_a_cuda_device_and_without_one_the_cpu() -> None:
    assert QwenPromptExpander().device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    assert QwenPromptExpander(is_vl=True).model_name == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert QwenPromptExpander("Qwen2.5_3B").model_name == "Qwen/Qwen2.5-3B-Instruct"
    assert QwenPromptExpander().model_name == "Qwen/Qwen2.5-14B-Instruct"
