"""From a checkpoint folder, or from nothing but sizes, to the networks an engine needs. Reads headers, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.types import Component
from wan.engine.weights.stream import dummy_weights, find_weights, open_weights
from wan.modules.model import WanModel, build_dit
from wan.modules.t5 import build_text_encoder, umt5_xxl
from wan.modules.tokenizers import HuggingfaceTokenizer
from wan.modules.vae import VAE_2_1, VAE_2_2, WanVAEModel, build_vae

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """One upstream-layout checkpoint folder and the task config that says what is in it."""

    folder: Path
    config: Any

    @property
    def experts(self) -> dict[str, Path]:
        """Expert name -> the folder of its config.json and weights."""
        if "low_noise_checkpoint" not in self.config:
            return {"dit": self.folder}
        return {
            "high": self.folder / self.config.high_noise_checkpoint,
            "low": self.folder / self.config.low_noise_checkpoint,
        }

    @property
    def text_encoder(self) -> Path:
        return self.folder / self.config.t5_checkpoint

    @property
    def tokenizer(self) -> Path:
        return self.folder / self.config.t5_tokenizer

    @property
    def vae(self) -> Path:
        return self.folder / self.config.vae_checkpoint

    def check(self) -> None:
        """Raise BadCheckpoint naming the first thing missing, within milliseconds: only names are looked at."""
        if not self.folder.is_dir():
            raise BadCheckpoint(
                f"checkpoint folder {str(self.folder)!r} does not exist; pass --ckpt_dir with the folder you downloaded"
            )
        wanted = [
            self.text_encoder,
            self.tokenizer,
            self.vae,
            *(path / "config.json" for path in self.experts.values()),
        ]
        for path in wanted:
            if not path.exists():
                raise BadCheckpoint(
                    f"checkpoint folder {str(self.folder)!r} has no {str(path.relative_to(self.folder))!r}; it is not "
                    f"a folder for {self.config['__name__']!r}, or the download is incomplete"
                )
        for path in self.experts.values():
            find_weights(path)

    def components(self) -> list[Component]:
        """The networks of this folder. Headers are read and compared with the networks' shapes here."""
        self.check()
        experts = [
            _Network(find_weights(path), partial(build_dit, self._dit_config(path))).component(
                name, self.config.param_dtype, WanModel.float32_keys
            )
            for name, path in self.experts.items()
        ]
        text = _Network(self.text_encoder, self._build_text_encoder)
        vae = _Network(self.vae, build_vae)
        return [*experts, text.component("text_encoder", self.config.t5_dtype), vae.component("vae", torch.float32)]

    def _dit_config(self, folder: Path) -> dict[str, Any]:
        """config.json of one expert; raises BadCheckpoint where the task's text is longer than the expert's."""
        fields = read_json(folder / "config.json")
        if fields.get("text_len", self.config.text_len) < self.config.text_len:
            raise BadCheckpoint(
                f"{str(folder / 'config.json')!r} has text_len {fields['text_len']!r}, {self.config['__name__']!r} has "
                f"{self.config.text_len!r}; pass the task this checkpoint belongs to"
            )
        return fields

    def _build_text_encoder(self, shapes: Shapes) -> nn.Module:
        encoder = build_text_encoder(shapes)
        encoder.tokenizer = HuggingfaceTokenizer(self.tokenizer, seq_len=self.config.text_len, clean="whitespace")
        return encoder


@dataclass(frozen=True)
class _Network:
    """A weight file and the function that makes its module from the file's shapes."""

    path: Path
    build: Callable[[Shapes], nn.Module]

    def component(self, name: str, dtype: torch.dtype, float32: Callable[[str], bool] = lambda key: False) -> Component:
        return Component(
            name=name, build=lambda: self.build(self.shapes), weights=lambda module: self.stream(), dtype=dtype,
            is_expert=name in ("dit", "high", "low"), float32=float32,
        )  # fmt: skip

    @cached_property
    def shapes(self) -> Shapes:
        return open_weights(self.path).shapes()

    def stream(self) -> Iterable[tuple[str, Tensor]]:
        return open_weights(self.path).stream()


def dummy_components(config: Any) -> list[Component]:
    """The networks of a task in their real sizes with random weights: anything can be run and timed, nothing loaded."""
    names = ("high", "low") if "low_noise_checkpoint" in config else ("dit",)
    channels = config.get("z_dim", 16)
    fields = {key: config[key] for key in ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_len", "eps")}
    text_sizes, vae_sizes = config.get("t5_sizes", {}), config.get("vae_sizes", {})
    fields |= {"in_dim": channels, "out_dim": channels, "model_type": "t2v", "text_dim": text_sizes.get("dim", 4096)}
    dit = partial(build_dit, fields, None)

    def text_encoder() -> nn.Module:
        encoder = umt5_xxl(encoder_only=True, device="meta", **text_sizes)
        assert isinstance(encoder, nn.Module)
        encoder.tokenizer = WordTokenizer(config.text_len)
        return encoder

    def vae() -> nn.Module:
        with torch.device("meta"):
            return WanVAEModel(replace(VAE_2_2 if channels == VAE_2_2.z_dim else VAE_2_1, **vae_sizes))

    experts = [
        Component(
            name=name, build=dit, weights=partial(dummy_weights, seed=seed), dtype=config.param_dtype,
            is_expert=True, float32=WanModel.float32_keys,
        )
        for seed, name in enumerate(names)
    ]  # fmt: skip
    return [
        *experts,
        Component(name="text_encoder", build=text_encoder, weights=dummy_weights, dtype=config.t5_dtype),
        Component(name="vae", build=vae, weights=dummy_weights, dtype=torch.float32),
    ]


class WordTokenizer:
    """Stands in for a tokenizer where there is no checkpoint: one number per word, in the call of the real one."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def __call__(self, sequence: Iterable[str], **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(0, self.seq_len, dtype=torch.long)
        for text in sequence:
            words = [2 + sum(map(ord, word)) % 64 for word in text.split()][: self.seq_len - 1] + [1]
            row = torch.tensor(words + [0] * (self.seq_len - len(words)))
            ids = torch.cat([ids, row[None]])
        return ids, (ids != 0).long()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises BadCheckpoint when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{str(path)!r} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{str(path)!r} holds a {type(content).__name__}, not an object; download it again")
    return content
