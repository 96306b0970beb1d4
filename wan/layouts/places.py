"""The parts of a checkpoint and where they are, found or named by the user. Looks at names and config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.adapter import STEM as ADAPTER
from wan.engine.weights.files import check_content
from wan.engine.weights.lora import LoRAFile, open_lora
from wan.engine.weights.stream import find_weights

EXPERTS = ("dit", "high", "low")
STEMS = ("diffusion_pytorch_model", "model", ADAPTER)
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")

_PARTS = {
    "dit": "dit", "high": "dit", "low": "dit_low", "text_encoder": "t5", "vae": "vae", "clip": "clip",
    "tokenizer": "tokenizer",
}  # fmt: skip
_WHAT = {
    "dit": "the transformer",
    "high": "the high-noise transformer",
    "low": "the low-noise transformer",
    "text_encoder": "the umT5 text encoder",
    "vae": "the VAE",
    "clip": "the CLIP image encoder",
}


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """Files named one by one, each in place of what the checkpoint folder holds. Fields are the flags of generate.py.

    `dit` is the transformer (of two experts the high-noise one), `tokenizer` a folder, tokenizer.json or spiece.model;
    the others a weight file in any layout, an index of shards, or a folder with one.
    """

    dit: str | Path | None = None
    dit_low: str | Path | None = None
    vae: str | Path | None = None
    t5: str | Path | None = None
    tokenizer: str | Path | None = None
    clip: str | Path | None = None
    loras: tuple[tuple[str, Path], ...] = ()
    """LoRAs and the flags that name them: what they widen makes another model of a transformer."""

    def by_part(self, experts: tuple[str, ...], parts: tuple[str, ...]) -> dict[str, Path]:
        """What was given, by the names of the parts. Raises BadCheckpoint for a file this task has no use for."""
        if self.clip is not None and "clip" not in parts:
            raise BadCheckpoint(f"--clip {str(self.clip)!r}: this task looks at no image through CLIP; leave it out")
        if self.dit_low is not None and "low" not in experts:
            raise BadCheckpoint(f"--dit_low {str(self.dit_low)!r}: this task has one transformer; leave the flag out")
        given: dict[str, Path] = {}
        for part, name in _PARTS.items():
            value = getattr(self, name)
            if value is None or (part in EXPERTS and part not in experts):
                continue
            given[part] = Path(value).expanduser()
            if not given[part].exists():
                raise BadCheckpoint(f"--{name} {str(value)!r} does not exist")
        return given

    def named(self) -> dict[str, str | Path]:
        """What was given in place of what the folder holds, by flag."""
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "loras"}
        return {name: path for name, path in given.items() if path is not None}

    def widening(self) -> list[tuple[str, Path]]:
        """The LoRAs that may widen a transformer, each with its flag."""
        return [(flag, path) for flag, path in self.loras if open_lora(path).may_widen]

    def loras_of(self, expert: str) -> list[LoRAFile]:
        """The LoRAs that may widen one expert. Raises BadCheckpoint for a file that cannot be read."""
        flags = ("lora", f"lora_{expert}")
        return [open_lora(path).for_expert(expert) for flag, path in self.widening() if flag in flags]

    def __bool__(self) -> bool:
        return bool(self.named())


@dataclass(frozen=True, kw_only=True)
class Places:
    """Part -> its weight file, folder of weights or tokenizer; None for what was not found."""

    layout: str
    root: Path | None
    paths: Mapping[str, Path | None]

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(part for part in self.paths if part in EXPERTS)

    def lacking(self) -> list[str]:
        """What is missing: paths relative to the root, or the part and the flag that names it."""
        lacking: list[str] = []
        for part, path in self.paths.items():
            if path is not None:
                lacking += [self._said(each) for each in _missing(path, part)]
            elif part != "tokenizer":  # it may lie inside the text encoder's file
                lacking.append(f"{_WHAT[part]} (--{_PARTS[part]})")
        return lacking

    def weights(self, part: str) -> Path:
        """The weight file, index or first shard of a part. Raises BadCheckpoint if there is none."""
        path = self.paths[part]
        if path is None:
            raise BadCheckpoint(f"{_WHAT[part]} is missing; pass --{_PARTS[part]}")
        return find_weights(path, stem_of(path)) if path.is_dir() else path

    def fields(self, part: str) -> dict[str, Any]:
        """The part's config.json, where it lies in a folder of its own; {} otherwise."""
        path = self.paths[part]
        config = None if path is None else path / "config.json"
        return read_json(config) if config is not None and config.is_file() else {}

    def check_tokenizer(self) -> None:
        """Raise BadCheckpoint for a tokenizer without content."""
        path = self.paths["tokenizer"]
        if path is None:
            return
        if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise BadCheckpoint(
                f"{str(path)!r} has no tokenizer.json and no spiece.model; fetch tokenizer.json of google/umt5-xxl, or "
                "name another tokenizer with --tokenizer"
            )
        for file in [path] if path.is_file() else [path / name for name in TOKENIZER_FILES]:
            if file.is_file():
                check_content(file)

    def _said(self, path: Path) -> str:
        inside = self.root is not None and path.is_relative_to(self.root)
        return str(path.relative_to(self.root)) if inside and self.root is not None else str(path)


def stem_of(folder: Path) -> str:
    """How the weights in a folder are called: diffusers' models one way, transformers' and PEFT's in others."""
    return next((stem for stem in STEMS if any(folder.glob(f"{stem}*.safetensors*"))), STEMS[0])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises BadCheckpoint when there is none."""
    check_content(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{str(path)!r} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{str(path)!r} holds a {type(content).__name__}, not an object; download it again")
    return content


def _missing(path: Path, part: str) -> list[Path]:
    """What is not there of one part. A folder of weights needs its config.json if it is a transformer's."""
    if part == "tokenizer" or path.is_file():
        return [] if path.exists() else [path]
    if not path.is_dir() and part not in EXPERTS:
        return [path]
    lacking = [path / "config.json"] if part in EXPERTS and not (path / "config.json").is_file() else []
    return lacking + _missing_weights(path)


def _missing_weights(folder: Path) -> list[Path]:
    stem = stem_of(folder)
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise BadCheckpoint(f"{str(index)!r} cannot be read: it has no weight_map; download it again")
        return [folder / name for name in sorted(set(shards.values())) if not (folder / name).is_file()]
    single = folder / f"{stem}.safetensors"
    return [] if single.is_file() or any(folder.glob(f"{stem}*.safetensors")) else [single]
