"""A language model on this machine, text alone or with pictures, through transformers.

It is loaded for the first prompt, computes where it fits, and is gone after `close`, before the video's own weights
come. transformers' processors for Qwen-VL need torchvision for their videos, which never occur here: so the picture
processor and the tokenizer are used by themselves, and the places of the pictures are filled in by `_with_places`.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wan.engine.errors import BadRequest
from wan.prompting.answers import MAX_TOKENS, unended

if TYPE_CHECKING:
    from PIL import Image

PICTURE_AREA = 1280 * 28 * 28
"""Pixels a model looks at per picture, upstream's limit: more cost memory and tell it nothing new."""

_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
_GIB = 1 << 30
_LOG = logging.getLogger("wan.prompting")


class LocalModel:
    """A chat model by folder or by its name on Hugging Face. `device` is where it should compute."""

    def __init__(self, name: str, *, device: torch.device, offline: bool = False) -> None:
        self.name = name
        self.device = device
        self.offline = offline

    @property
    def sees(self) -> bool:
        """Whether it takes pictures. Raises as `answer` does, where there is no such model."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        return type(self._config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    def answer(self, system: str, text: str, pictures: Sequence[Image.Image], seed: int) -> str:
        """What it writes, the same for the same seed and device. Raises BadRequest, and what transformers raises."""
        content: Any = text
        if pictures:
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        with _quiet():
            model, tokenizer = self._model, self._tokenizer
            if not tokenizer.chat_template:
                raise BadRequest(f"{self.name!r} has no chat template: name a model that was trained to follow orders")
            # Off for models that would spend all their tokens on thoughts; templates ignore what they do not know.
            chat = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            inputs = self._seen(chat, pictures) if pictures else dict(tokenizer(chat, return_tensors="pt"))
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.inference_mode():
                torch.manual_seed(seed)
                tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS)[0]
        written = tokens[inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if len(written) >= MAX_TOKENS and int(written[-1]) not in ends:
            raise unended()
        return str(tokenizer.decode(written, skip_special_tokens=True))

    def close(self) -> None:
        """Give the memory back."""
        for name in ("_model", "_tokenizer", "_pictures"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _folder(self) -> Path:
        """Where its files lie; they are downloaded if need be and if they would fit."""
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.name, flags=re.ASCII) is None or folder.is_absolute():
            raise BadRequest(f"{self.name!r} is neither a folder nor OWNER/NAME of a model on Hugging Face")
        from huggingface_hub import is_offline_mode, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

        offline = self.offline or is_offline_mode()
        try:
            if not offline:
                self._check_download(snapshot_download(self.name, allow_patterns=list(_FILES), dry_run=True))
            return Path(snapshot_download(self.name, allow_patterns=list(_FILES), local_files_only=offline))
        except RepositoryNotFoundError as error:
            raise BadRequest(f"{self.name!r} is neither a folder nor a model on Hugging Face") from error
        except LocalEntryNotFoundError as error:
            why = "and downloads are off" if offline else "and the hub cannot be reached"
            raise BadRequest(
                f"{self.name!r} is not in the Hugging Face cache, {why}: name a folder or another model with "
                "--prompt_extend_model"
            ) from error

    def _check_download(self, files: Sequence[Any]) -> None:
        """Raise BadRequest before gigabytes come that cannot be stored, or could not be used."""
        from huggingface_hub import constants

        size = {file.filename: file.file_size or 0 for file in files}
        self._check_ram(sum(bytes_ for name, bytes_ in size.items() if name.endswith(".safetensors")))
        coming = sum(size[file.filename] for file in files if file.will_download)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if coming + _GIB > free:
            raise BadRequest(
                f"{self.name} needs {coming / _GIB:.1f} GiB more in {str(cache)!r}, where {free / _GIB:.1f} are free: "
                "name a smaller model with --prompt_extend_model"
            )
        if coming:
            _LOG.info("%s: downloading %.1f GiB into %s", self.name, coming / _GIB, cache)

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._folder, trust_remote_code=False)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)

    @cached_property
    def _pictures(self) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self._folder, trust_remote_code=False)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        weights = sum(path.stat().st_size for path in self._folder.glob("*") if path.suffix in (".safetensors", ".bin"))
        self._check_ram(weights)
        device = self._place(weights)
        kind = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        # The file's dtype, mostly bfloat16: on a CPU half of float32's memory. Old cards compute faster in float16.
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        model = kind.from_pretrained(
            self._folder, config=self._config, dtype=torch.float16 if old else "auto", trust_remote_code=False
        )
        return model.to(device).eval()

    def _place(self, weights: int) -> torch.device:
        """The wanted device, or the CPU where the card has no room for the weights and what they compute."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            needed = weights + weights // 10 + _GIB
            if needed > free:
                _LOG.info(
                    "%s needs about %.1f GiB and %.1f are free on the GPU: it runs on the CPU, slowly; "
                    "--prompt_extend_model names a smaller one", self.name, needed / _GIB, free / _GIB,
                )  # fmt: skip
                return torch.device("cpu")
        return self.device

    def _check_ram(self, weights: int) -> None:
        """Raise BadRequest where loading would end with the system killing the process, and the video with it."""
        free = _free_ram()
        if free is not None and weights + _GIB > free:
            raise BadRequest(
                f"{self.name} needs {weights / _GIB + 1:.1f} GiB of RAM to load and {free / _GIB:.1f} are free: name a "
                "smaller model with --prompt_extend_model"
            )

    def _seen(self, chat: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """The inputs of a chat with pictures."""
        seen = dict(self._pictures(images=list(pictures), return_tensors="pt"))
        if "image_grid_thw" not in seen:
            raise BadRequest(f"{self.name!r} takes pictures in another way than Qwen-VL: name a Qwen-VL model")
        inputs = dict(self._tokenizer(self._with_places(chat, seen["image_grid_thw"]), return_tensors="pt"))
        # Later versions of transformers tell pictures from text by this, earlier ones by the tokens alone.
        if "mm_token_type_ids" in inspect.signature(self._model.forward).parameters:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._config.image_token_id).int()
        return inputs | seen

    def _with_places(self, chat: str, grids: torch.Tensor) -> str:
        """`chat` with as many picture tokens for each picture as it has cells after merging."""
        token = self._tokenizer.convert_ids_to_tokens(self._config.image_token_id)
        head, *tails = chat.split(token)
        if len(tails) != len(grids):
            raise BadRequest(f"the chat template of {self.name!r} has no place for pictures: name a Qwen-VL model")
        cells = [int(grid.prod()) // self._pictures.merge_size**2 for grid in grids]
        return head + "".join(token * count + tail for count, tail in zip(cells, tails, strict=True))


def _free_ram() -> int | None:
    """Bytes that can be had without swapping; None on a system that does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and advice between the lines of the program."""
    from transformers.utils import logging as voice

    level, bars = voice.get_verbosity(), voice.is_progress_bar_enabled()
    voice.set_verbosity_error()
    voice.disable_progress_bar()
    try:
        yield
    finally:
        voice.set_verbosity(level)
        if bars:
            voice.enable_progress_bar()
