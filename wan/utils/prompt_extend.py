"""Upstream's prompt expanders under upstream's names and arguments; `wan.prompting` does the work.

An expander never stops a video: what goes wrong stands in the output's `message`, beside the prompt as it was given.
Models load at the first call, not with the object, and leave the memory with `close`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from wan.engine.errors import BadRequest, WanError
from wan.prompting.answers import clean
from wan.prompting.local import PICTURE_AREA, LocalModel
from wan.prompting.pictures import read_pictures
from wan.prompting.service import ADDRESS, Service
from wan.prompting.system import system_prompt as instruction
from wan.prompting.system import user_text

if TYPE_CHECKING:
    from PIL import Image

    from wan.prompting.pictures import Source

__all__ = ["DashScopePromptExpander", "PromptExpander", "PromptOutput", "QwenPromptExpander"]

QWEN_NAMES = {
    "Qwen2.5_3B": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen2.5_7B": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen2.5_14B": "Qwen/Qwen2.5-14B-Instruct",
    "QwenVL2.5_3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "QwenVL2.5_7B": "Qwen/Qwen2.5-VL-7B-Instruct",
}
"""Short name -> model on Hugging Face."""

_LOG = logging.getLogger("wan.prompting")


@dataclass
class PromptOutput:
    """What became of a prompt. `status` False: `prompt` is the given one and `message` says why."""

    status: bool
    prompt: str
    seed: int
    system_prompt: str
    message: str


class LanguageModel(Protocol):
    """Whoever writes. `sees`: it takes pictures."""

    @property
    def sees(self) -> bool: ...

    def answer(self, system: str, text: str, pictures: Sequence[Image.Image], seed: int) -> str: ...

    def close(self) -> None: ...


class PromptExpander:
    """Extends prompts of `task` by a language model. `is_vl`: it is shown pictures, of at most `max_area` pixels."""

    def __init__(self, model: LanguageModel, model_name: str, task: str | None, *, is_vl: bool, max_area: int) -> None:
        self.model = model
        self.model_name = model_name
        self.task = task
        self.is_vl = is_vl
        self._max_area = max_area

    def __call__(
        self,
        prompt: str,
        system_prompt: str | None = None,
        tar_lang: str = "zh",
        image: Source | Sequence[Source] | None = None,
        seed: int = -1,
    ) -> PromptOutput:
        """The extended prompt, the same for the same seed. `image`: path or PIL image, or several, first one first."""
        seed = random.randint(0, sys.maxsize) if seed < 0 else seed
        output = PromptOutput(False, prompt, seed, system_prompt or "", "")
        try:
            pictures = self._pictures(image)
            if not prompt.strip() and not pictures:
                raise BadRequest("there is nothing to extend: the prompt is empty")
            output.system_prompt = system_prompt or instruction(
                self.task, tar_lang, pictures=len(pictures), unseen=image is not None, words=bool(prompt.strip())
            )
            text = user_text(prompt, tar_lang)
            output.message = self.model.answer(output.system_prompt, text, pictures, seed)
            output.prompt, output.status = clean(output.message), True
        except WanError as error:
            output.message = str(error)
        except Exception as error:  # whatever a model's own code raises, the user's prompt still makes the video
            output.message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        return output

    def close(self) -> None:
        """Give back the memory the model holds; the next call loads it again."""
        self.model.close()

    def _pictures(self, image: Source | Sequence[Source] | None) -> list[Image.Image]:
        if image is None or not self.is_vl:
            return []
        if not self.model.sees:
            _LOG.info("%s takes no pictures: the prompt is extended from its words alone", self.model_name)
            return []
        return read_pictures(image, self._max_area)


class DashScopePromptExpander(PromptExpander):
    """Extends prompts by Alibaba Cloud's service. The key is `api_key` or the variable DASH_API_KEY."""

    def __init__(
        self,
        api_key: str | None = None,
        model_name: str | None = None,
        task: str | None = None,
        max_image_size: int = 512 * 512,
        retry_times: int = 4,
        is_vl: bool = False,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        """`max_image_size` is an area. Raises ValueError where there is no key."""
        key = (api_key or os.environ.get("DASH_API_KEY") or "").strip()
        if not key:
            raise BadRequest("there is no key for DashScope: set the environment variable DASH_API_KEY")
        name = dashscope_model(model_name, is_vl=is_vl)
        service = Service(
            key=key, model=name, address=os.environ.get("DASH_API_URL") or ADDRESS, sees=is_vl,
            tries=max(1, retry_times), timeout_s=timeout_s,
        )  # fmt: skip
        super().__init__(service, name, task, is_vl=is_vl, max_area=max_image_size)


class QwenPromptExpander(PromptExpander):
    """Extends prompts by a chat model on this machine: a short name of `QWEN_NAMES`, a folder or OWNER/NAME."""

    def __init__(
        self,
        model_name: str | None = None,
        task: str | None = None,
        device: int | str | torch.device = 0,
        is_vl: bool = False,
        *,
        offline: bool = False,
    ) -> None:
        """`device`: a number is a CUDA device, or the CPU where there are none. `offline`: download nothing."""
        name = local_model(model_name, is_vl=is_vl)
        self.device = _device(device)
        model = LocalModel(name, device=self.device, offline=offline)
        super().__init__(model, name, task, is_vl=is_vl, max_area=PICTURE_AREA)


def dashscope_model(name: str | None, *, is_vl: bool) -> str:
    """`name`, or the service's model that is asked by default."""
    return name or ("qwen-vl-max" if is_vl else "qwen-plus")


def local_model(name: str | None, *, is_vl: bool) -> str:
    """Folder or Hugging Face name of a model on this machine: short names spelled out, None the default."""
    name = name or ("QwenVL2.5_7B" if is_vl else "Qwen2.5_14B")
    return QWEN_NAMES.get(name, name)


def _device(device: Any) -> torch.device:
    if isinstance(device, int):
        return torch.device("cuda", device) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device)
