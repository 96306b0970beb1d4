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

# Field of the configuration, or beginning of a weight's name, that only this class has -> the class.
_CLASSES = {"vace_": "wan.modules.vace_model:VaceWanModel"}


def build_dit(config: Mapping[str, Any], shapes: Shapes | None = None) -> WanModel:
    """A transformer on the meta device for a config.json and the shapes of its checkpoint.

    Shapes win where the config is silent; a contradiction is a `BadCheckpoint`.
    """
    shapes = shapes or {}
    cls = _class_of((*config, *shapes))
    sizes = sizes_from(shapes)
    known = inspect.signature(cls).parameters
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
    arguments |= _vace_layers(arguments, shapes)
    with torch.device("meta"):
        return cls(**arguments).eval()


def sizes_from(shapes: Shapes) -> dict[str, Any]:
    """The constructor arguments that the shapes of a checkpoint decide."""
    sizes: dict[str, Any] = {}
    if patch := shapes.get("patch_embedding.weight"):
        sizes |= {"dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:])}
        if head := shapes.get("head.head.weight"):
            sizes["out_dim"] = head[0] // math.prod(patch[2:])
    for name, key in (
        ("text_dim", "text_embedding.0.weight"),
        ("freq_dim", "time_embedding.0.weight"),
        ("ffn_dim", "blocks.0.ffn.2.weight"),
        ("vace_in_dim", "vace_patch_embedding.weight"),
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
