"""From config.json and the shapes of a checkpoint to the transformer that has them, without memory for weights."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from wan.engine.errors import BadCheckpoint
from wan.modules.model import WanModel

__all__ = ["build_dit", "read_config"]

Shapes = Mapping[str, tuple[int, ...]]
_AUDIO = "casual_audio_encoder.encoder"

# Field of the configuration, or beginning of a weight's name, that only this class has -> the class.
_CLASSES = {
    "motion_encoder": "wan.modules.animate.model_animate:WanAnimateModel",
    "vace_": "wan.modules.vace_model:VaceWanModel",
    "audio_inject": "wan.modules.s2v.model_s2v:WanModel_S2V",
}


def build_dit(config: Mapping[str, Any], shapes: Shapes | None = None) -> WanModel:
    """A transformer on the meta device for a config.json and the shapes of its checkpoint.

    Shapes win where the config is silent; a contradiction is a `BadCheckpoint`.
    """
    shapes = shapes or {}
    cls = _class_of((*config, *shapes))
    known = inspect.signature(cls).parameters
    sizes = {name: value for name, value in sizes_from(shapes).items() if name in known} | cls.own_sizes(shapes)
    given = {key: value for key, value in config.items() if key in known and value is not None}
    for key, value in sizes.items():
        if key in given and (tuple(given[key]) if isinstance(value, tuple) else given[key]) != value:
            raise BadCheckpoint(
                f"the configuration says {key} = {given[key]!r} but the weights have {value!r}; they do not belong "
                "together"
            )
    arguments = given | sizes
    if "num_heads" not in arguments and "dim" in arguments:
        arguments["num_heads"] = max(1, arguments["dim"] // 128)
    arguments |= _vace_layers(arguments, shapes) | _listening_layers(arguments, shapes)
    with torch.device("meta"):
        return cls(**arguments).eval()


def sizes_from(shapes: Shapes) -> dict[str, Any]:
    """The constructor arguments that the shapes of a checkpoint decide."""
    sizes: dict[str, Any] = {}
    if patch := shapes.get("patch_embedding.weight"):
        sizes |= {"dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:])}
        # Image-to-video of 2.1 and 2.2 have one model_type: only the weights tell whether there is an image branch.
        sizes["image_dim"] = shapes.get("img_emb.proj.0.weight", (0,))[0]
        sizes["image_positions"] = shapes.get("img_emb.emb_pos", (1, 0))[1]
        if head := shapes.get("head.head.weight"):
            sizes["out_dim"] = head[0] // math.prod(patch[2:])
    for name, key in (
        ("text_dim", "text_embedding.0.weight"),
        ("freq_dim", "time_embedding.0.weight"),
        ("ffn_dim", "blocks.0.ffn.2.weight"),
        ("vace_in_dim", "vace_patch_embedding.weight"),
        ("cond_dim", "cond_encoder.weight"),
        ("audio_dim", f"{_AUDIO}.conv1_local.conv.weight"),
    ):
        if key in shapes:
            sizes[name] = shapes[key][1]
    if layers := _count(shapes, "blocks"):
        sizes |= {
            "num_layers": layers,
            "qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes,
            "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        }
    return sizes


def _vace_layers(arguments: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Weights tell how many blocks VACE's side stack has, not where they act: published models space them evenly."""
    count = _count(shapes, "vace_blocks")
    if not count:
        return {}
    given = arguments.get("vace_layers")
    if given is not None and len(given) != count:
        raise BadCheckpoint(
            f"the configuration says vace_layers = {list(given)!r} but the weights have {count} such blocks; they do "
            "not belong together"
        )
    stride = arguments["num_layers"] // count
    return {"vace_layers": tuple(range(0, stride * count, stride)) if given is None else given}


def _listening_layers(arguments: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Weights tell how many blocks listen to speech, not after which layers; of the published model it is known."""
    count = _count(shapes, "audio_injector.injector")
    if not count:
        return {}
    tokens = {"num_audio_token": shapes[f"{_AUDIO}.conv1_local.conv.weight"][0] * 4 // arguments["dim"]}
    given = arguments.get("audio_inject_layers")
    if given is None and (count, arguments["num_layers"]) != (12, 40):
        raise BadCheckpoint(f"weights alone do not tell where its {count} listening blocks act; add its config.json")
    if given is not None and len(given) != count:
        raise BadCheckpoint(
            f"the configuration says audio_inject_layers = {list(given)!r} but the weights have {count} such blocks; "
            "they do not belong together"
        )
    return tokens


def _count(shapes: Shapes, blocks: str) -> int:
    """How many blocks of that name there are."""
    numbers = [int(match[1]) for key in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", key))]
    return max(numbers) + 1 if numbers else 0


def _class_of(names: tuple[str, ...]) -> type[WanModel]:
    for begins, place in _CLASSES.items():
        if any(name.startswith(begins) for name in names):
            module, _, name = place.partition(":")
            cls: type[WanModel] = getattr(import_module(module), name)
            return cls
    return WanModel


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`; {} where there is none, because the sizes are in the weights too."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not valid JSON ({error}); download it again") from error
    return config
