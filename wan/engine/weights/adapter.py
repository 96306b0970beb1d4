"""PEFT's adapter folders as checkpoints: thin matrices, and some layers whole, over the weights of another folder.

`adapter_config.json` says which. A layer that is stored whole may have another shape than the one it replaces, as the
patch embedding of an image model made from a text model: a few megabytes in place of a second checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.files import check_content
from wan.engine.weights.lora import LoRAFile, read_lora, widened
from wan.engine.weights.stream import WeightFile, find_weights, open_weights

__all__ = ["STEM", "AdaptedFile", "WidenedFile", "base_of", "open_adapted"]

STEM = "adapter_model"
CONFIG = "adapter_config.json"
_VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")


class AdaptedFile(WeightFile):
    """The tensors of `base` with those of an `adapter` merged in, in float32, as they are read."""

    def __init__(self, base: WeightFile, adapter: WeightFile, strength: float) -> None:
        super().__init__(adapter.path, {}, base.dialect)
        self._base, self._adapter, self._strength = base, adapter, strength
        self._lora, self._whole = read_lora(adapter)
        self._lora.check(base.shapes(), widening=True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = self._adapter.shapes()
        base = {key: self._lora.shape(key, shape) for key, shape in self._base.shapes().items()}
        return base | {ours: stored[key] for ours, key in self._whole.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        stored = self._adapter.dtypes()
        base = self._base.dtypes()
        merged = {key: torch.float32 for key in base if self._lora.changes(key)}
        return base | merged | {ours: stored[key] for ours, key in self._whole.items()}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = list(self.shapes() if keys is None else keys)
        ours = {self._whole[key]: key for key in wanted if key in self._whole}
        for stored, tensor in self._adapter.stream(ours):
            yield ours[stored], tensor
        for key, tensor in self._base.stream(key for key in wanted if key not in self._whole):
            yield key, self._lora.added(key, tensor, self._strength)


class WidenedFile(WeightFile):
    """The tensors of `base`, with zeros for the input channels that `loras` give its layers, yet to be merged."""

    def __init__(self, base: WeightFile, loras: Sequence[LoRAFile]) -> None:
        super().__init__(base.path, {}, base.dialect)
        self._base, self._loras = base, loras

    @property
    def widens(self) -> bool:
        """Whether any layer gets more input channels."""
        return self.shapes() != self._base.shapes()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._base.shapes()
        for lora in self._loras:
            shapes = {key: lora.shape(key, shape) for key, shape in shapes.items()}
        return shapes

    def dtypes(self) -> dict[str, torch.dtype]:
        return self._base.dtypes()

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        shapes = self.shapes()
        for key, tensor in self._base.stream(keys):
            yield key, widened(tensor, shapes[key])


def base_of(path: Path) -> Path | None:
    """The weight file that the adapter in `path` changes; None where `path` is none. Raises BadCheckpoint."""
    if not (path.name.startswith(STEM) and path.is_file()):
        return None
    named = str(_config(path).get("base_model_name_or_path"))
    folder = (path.parent / Path(named).expanduser()).resolve()
    if not folder.is_dir():
        raise BadCheckpoint(
            f"{str(path.parent / CONFIG)!r} says base_model_name_or_path {named!r}, and there is no such folder; write "
            "the path of the transformer that the adapter belongs to into it"
        )
    return find_weights(folder)


def open_adapted(base: WeightFile, path: Path) -> AdaptedFile:
    """`base` as the adapter in `path` changes it. Reads headers alone; raises BadCheckpoint."""
    config = _config(path)
    variant = next((name for name in _VARIANTS if config.get(name)), None)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or variant or not isinstance(rank, int) or not isinstance(alpha, int | float):
        said = f"{variant} {config[variant]!r}" if variant else f"peft_type {config.get('peft_type')!r}, r {rank!r}"
        raise BadCheckpoint(
            f"{str(path.parent / CONFIG)!r} has {said}: only plain LoRA can be merged; merge it with PEFT"
        )
    return AdaptedFile(base, open_weights(path), alpha / max(rank, 1))


def _config(path: Path) -> dict[str, Any]:
    config = path.parent / CONFIG
    check_content(config)
    try:
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{str(config)!r} cannot be read as JSON ({error}); download it again") from error
    return content
