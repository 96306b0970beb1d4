"""From a checkpoint, or from nothing but sizes, to the networks an engine needs. Reads headers, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.types import Component
from wan.engine.weights.adapter import WidenedFile
from wan.engine.weights.dialects import CLIP, DIT, SPIECE, TEXT_ENCODER, VAE, open_network
from wan.engine.weights.lora import LoRAFile
from wan.engine.weights.quantised import QuantisedFile
from wan.engine.weights.stream import WeightFile, check_fit, dummy_weights, open_weights
from wan.layouts import CheckpointFiles, Places, experts_of, locate
from wan.layouts.models import Shapes, model_of
from wan.modules.building import build_dit
from wan.modules.clip import ImageTower, build_clip
from wan.modules.model import WanModel
from wan.modules.t5 import build_text_encoder, umt5_xxl
from wan.modules.tokenizers import HuggingfaceTokenizer
from wan.modules.vae import WanVAEModel, build_vae
from wan.modules.vae_config import VAE_2_1, VAE_2_2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in any layout and the task config that says what it must hold.

    `folder` None means that `files` names everything; else they replace what the folder holds. `kind` is the first
    part of the task's name.
    """

    folder: Path | None
    config: Any
    files: CheckpointFiles | None = None
    kind: str = "t2v"

    @cached_property
    def places(self) -> Places:
        """Where each part lies. Raises BadCheckpoint naming all that is missing; only names are looked at."""
        if self.folder is not None and not self.folder.is_dir():
            raise BadCheckpoint(
                f"checkpoint folder {str(self.folder)!r} does not exist; pass --ckpt_dir with the folder you downloaded"
            )
        places = locate(self.folder, self.config, self.files, self.kind)
        if lacking := places.lacking():
            where = "the files given lack" if places.root is None else f"checkpoint folder {str(places.root)!r} lacks"
            raise BadCheckpoint(
                f"{where} {', '.join(lacking)}; it is no checkpoint for {self.config['__name__']!r}, or the download "
                "is incomplete"
            )
        return places

    def check(self) -> None:
        """Raise BadCheckpoint naming file and key if anything does not fit. Reads headers, no weight."""
        networks = self._networks
        for part in self.places.experts:
            self._check_kind(networks[part])
        modules = {part: network.checked() for part, network in networks.items()}
        self.places.check_tokenizer()
        self._check_tokenizer(networks["text_encoder"])
        for part in self.places.experts:
            self._check_together(networks, modules, part)

    def components(self) -> list[Component]:
        """The networks of this checkpoint, checked."""
        self.check()
        experts = [
            self.network(part).component(self.config.param_dtype, WanModel.float32_keys) for part in self.places.experts
        ]
        text, vae = self.network("text_encoder"), self.network("vae")
        speaking = replace(text, build=self._with_tokenizer)
        looking = [self.network("clip").component(self.config.clip_dtype)] if "clip" in self.places.paths else []
        return [*experts, speaking.component(self.config.t5_dtype), vae.component(torch.float32), *looking]

    def tokenizer(self) -> HuggingfaceTokenizer:
        """The tokenizer, from its folder or file, or from inside the text encoder's file."""
        path = self.places.paths["tokenizer"]
        name = path if path is not None else self.network("text_encoder").spiece()
        return HuggingfaceTokenizer(name, seq_len=self.config.text_len, clean="whitespace")

    def network(self, part: str) -> Network:
        """A part by name: "dit", "high", "low", "text_encoder", "vae", "clip"."""
        return self._networks[part]

    @cached_property
    def _networks(self) -> dict[str, Network]:
        return {part: self._network(part) for part in self.places.paths if part != "tokenizer"}

    def _network(self, part: str) -> Network:
        path, fields = self.places.weights(part), dict(self.places.fields(part))
        if part == "text_encoder":
            return Network(part, TEXT_ENCODER, path, build_text_encoder)
        if part == "vae":
            return Network(part, VAE, path, build_vae)
        if part == "clip":
            return Network(part, CLIP, path, build_clip)
        loras = [] if self.files is None else self.files.loras_of(part)
        for name in ("in_dim", "in_channels") if loras else ():
            fields.pop(name, None)  # what LoRAs widen, shapes tell
        return Network(part, DIT, path, partial(self._build_dit, fields), tuple(loras))

    def _build_dit(self, fields: dict[str, Any], shapes: Shapes) -> nn.Module:
        """A transformer as its config.json, the task and the shapes say, in this order."""
        given = dict(fields)
        if "num_attention_heads" in fields:
            given = {name: fields[theirs] for name, theirs in _DIFFUSERS_FIELDS.items() if theirs in fields}
        if not fields and shapes.get("patch_embedding.weight", (0,))[0] == self.config.dim:
            given = {name: self.config[name] for name in ("ffn_dim", "num_heads", "num_layers", "freq_dim", "eps")}
        if given.setdefault("text_len", self.config.text_len) < self.config.text_len:
            raise BadCheckpoint(
                f"config.json has text_len {given['text_len']!r}, {self.config['__name__']!r} has "
                f"{self.config.text_len!r}; pass the task this checkpoint belongs to"
            )
        return build_dit(given, shapes)

    def _with_tokenizer(self, shapes: Shapes) -> nn.Module:
        encoder, tokenizer = build_text_encoder(shapes), self.tokenizer()
        rows = encoder.token_embedding.weight.shape[0]
        if tokenizer.vocab_size > rows:
            raise BadCheckpoint(
                f"it knows {rows} tokens and the tokenizer {tokenizer.name!r} {tokenizer.vocab_size}; pass the one "
                "that belongs to it with --tokenizer"
            )
        encoder.tokenizer = tokenizer
        return encoder

    def _check_kind(self, network: Network) -> None:
        model = model_of(network.shapes)
        if model is not None and model.kind != self.kind:
            raise BadCheckpoint(
                f"{network.told} is a transformer for {model.kind}; {self.config['__name__']!r} needs one for "
                f"{self.kind}"
            )

    def _check_tokenizer(self, text_encoder: Network) -> None:
        if self.places.paths["tokenizer"] is None and not text_encoder.has_spiece:
            raise BadCheckpoint(
                f"there is no tokenizer, and {str(text_encoder.path)!r} has none inside: fetch tokenizer.json of "
                "google/umt5-xxl from Hugging Face and pass it with --tokenizer"
            )

    def _check_together(self, networks: Mapping[str, Network], modules: Mapping[str, Any], part: str) -> None:
        """Whether the encoders and the VAE speak the transformer's language."""
        dit, text, vae = modules[part], modules["text_encoder"], modules["vae"]
        pairs = [
            ("text embeddings", dit.text_dim, "text_encoder", text.dim),
            ("latents", dit.out_dim, "vae", vae.config.z_dim),
        ]
        if "clip" in modules:
            pairs.append(("image embeddings", dit.config.image_dim, "clip", modules["clip"].visual.dim))
        for what, mine, other, theirs in pairs:
            if mine != theirs:
                raise BadCheckpoint(
                    f"{str(networks[part].path)!r} works on {what} of width {mine}, {str(networks[other].path)!r} "
                    f"makes them {theirs} wide; they do not belong together"
                )


_DIFFUSERS_FIELDS = {
    "num_heads": "num_attention_heads", "num_layers": "num_layers", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim",
    "in_dim": "in_channels", "out_dim": "out_channels", "text_dim": "text_dim", "eps": "eps",
    "vace_layers": "vace_layers", "vace_in_dim": "vace_in_channels",
}  # fmt: skip
"""The fields of a transformer's config.json and diffusers' names for them."""


@dataclass(frozen=True)
class Network:
    """A part, its weight file, the function that makes its module from shapes, and LoRAs that may widen its layers."""

    part: str
    kind: str
    path: Path
    build: Callable[[Shapes], nn.Module]
    loras: tuple[LoRAFile, ...] = ()

    def component(self, dtype: torch.dtype, float32: Callable[[str], bool] = lambda key: False) -> Component:
        return Component(
            name=self.part, build=self._own, weights=lambda module: self.open().stream(), dtype=dtype,
            is_expert=self.kind == DIT, float32=float32,
        )  # fmt: skip

    @cached_property
    def shapes(self) -> Shapes:
        return self.open().shapes()

    def open(self) -> WeightFile:
        """The weights under our names, in the shapes they are loaded in. Opened anew: what a file holds is not kept."""
        return WidenedFile(self.stored(), self.loras) if self.loras else self.stored()

    def stored(self) -> WeightFile:
        """The weights under our names as the file has them."""
        return open_network(self.path, self.kind)

    @property
    def told(self) -> str:
        """The file, and what widens it, in words."""
        wider = [repr(str(lora.path)) for lora in self.loras if WidenedFile(self.stored(), [lora]).widens]
        return " with LoRA ".join((repr(str(self.path)), *wider))

    def module(self) -> nn.Module:
        """The module on the meta device. Raises BadCheckpoint naming the file where shapes make none."""
        try:
            return self.build(self.shapes)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{str(self.path)!r}: {error}") from error

    def checked(self) -> nn.Module:
        """The module, once the file's keys and shapes are known to be its own."""
        module, stored = self.module(), self.stored()
        check_fit(module, self.open())
        if isinstance(stored, QuantisedFile):
            stored.check_scales()
        self.__dict__["_kept"] = module
        return module

    def _own(self) -> nn.Module:
        """A module that nobody else has: for the first who asks, the one that was checked."""
        kept: nn.Module | None = self.__dict__.pop("_kept", None)
        return self.module() if kept is None else kept

    @property
    def has_spiece(self) -> bool:
        return SPIECE in open_weights(self.path).shapes()

    def spiece(self) -> bytes:
        """The sentencepiece model inside a text encoder's file."""
        [(_, tensor)] = open_weights(self.path).stream([SPIECE])
        return tensor.numpy().tobytes()


def dummy_components(config: Any) -> list[Component]:
    """The networks of a task in their real sizes with random weights: anything can be run and timed, nothing loaded."""
    names = experts_of(config)
    channels = config.get("z_dim", 16)
    fields = {key: config[key] for key in ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_len", "eps")}
    text_sizes, vae_sizes = config.get("t5_sizes", {}), config.get("vae_sizes", {})
    fields |= {"in_dim": channels, "out_dim": channels, "model_type": "t2v", "text_dim": text_sizes.get("dim", 4096)}
    given = (
        "vace_layers",
        "vace_in_dim",
        "in_dim",
        "model_type",
        "motion_encoder_dim",
        "image_dim",
        "image_positions",
        "audio_inject_layers",
    )
    fields |= {key: config[key] for key in given if key in config}
    dit = partial(build_dit, fields, None)

    def text_encoder() -> nn.Module:
        encoder = umt5_xxl(encoder_only=True, device="meta", **text_sizes)
        assert isinstance(encoder, nn.Module)
        encoder.tokenizer = WordTokenizer(config.text_len)
        return encoder

    def vae() -> nn.Module:
        with torch.device("meta"):
            return WanVAEModel(replace(VAE_2_2 if channels == VAE_2_2.z_dim else VAE_2_1, **vae_sizes))

    def clip() -> nn.Module:
        with torch.device("meta"):
            return ImageTower(**config.get("clip_sizes", {}))

    experts = [
        Component(
            name=name, build=dit, weights=partial(dummy_weights, seed=seed), dtype=config.param_dtype,
            is_expert=True, float32=WanModel.float32_keys,
        )
        for seed, name in enumerate(names)
    ]  # fmt: skip
    encoders = [
        Component(name="text_encoder", build=text_encoder, weights=dummy_weights, dtype=config.t5_dtype),
        Component(name="vae", build=vae, weights=dummy_weights, dtype=torch.float32),
    ]
    if "clip_checkpoint" in config:
        encoders.append(Component(name="clip", build=clip, weights=dummy_weights, dtype=config.clip_dtype))
    return [*experts, *encoders]


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
