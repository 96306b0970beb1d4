"""Which models a checkpoint holds, before a task is chosen: by keys and shapes, else by what config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.adapter import WidenedFile
from wan.engine.weights.dialects import DIT, identify
from wan.engine.weights.lora import LoRAFile
from wan.engine.weights.stream import find_weights, open_weights
from wan.layouts import comfyui, diffusers
from wan.layouts.models import Model, model_of
from wan.layouts.places import CheckpointFiles, read_json, stem_of


@dataclass(frozen=True, kw_only=True)
class Held:
    """A model of one or two transformers, and the file or folder it was told by."""

    model: Model
    experts: int
    told_by: Path


def held(folder: Path | None, files: CheckpointFiles | None = None) -> list[Held]:
    """The models of a checkpoint: at most one, but for a ComfyUI folder. Unreadable files are left for the check."""
    files = CheckpointFiles() if files is None else files
    transformers = _transformers(folder)
    root = comfyui.root_of(folder) if folder is not None else None
    if files.dit is not None:
        path = Path(files.dit).expanduser()
        two = files.dit_low is not None or len(transformers) > 1 or comfyui.Candidate(path=path).expert != "dit"
        model = _by_weights(path, files.loras_of("high" if two else "dit")) or _by_config(path)
        return [Held(model=model, experts=1 + two, told_by=path)] if model else []
    if root is not None:
        return list(dict.fromkeys(_in_comfyui(root)))
    loras = files.loras_of("high" if len(transformers) > 1 else "dit")
    models = ((path, _by_weights(path, loras) or _by_config(path)) for path in transformers)
    found = [(path, model) for path, model in models if model is not None]
    return [Held(model=found[0][1], experts=len(transformers), told_by=found[0][0])] if found else []


def _transformers(folder: Path | None) -> list[Path]:
    """The folders of the transformers, the high-noise one first."""
    if folder is None or not folder.is_dir() or comfyui.root_of(folder) is not None:
        return []
    if diffusers.recognises(folder):
        return [folder / name for name in ("transformer", "transformer_2") if (folder / name).is_dir()]
    two = [folder / name for name in ("high_noise_model", "low_noise_model") if (folder / name).is_dir()]
    return [folder / "high_noise_model", folder / "low_noise_model"] if two else [folder]


def _in_comfyui(root: Path) -> Iterator[Held]:
    """Each model once, told by its first file; quantised ones only where nothing else is there."""
    found = [(each, model) for each in comfyui.candidates(root, DIT) if (model := each.model) is not None]
    usable = [pair for pair in found if not pair[0].refused] or found
    seen = set()
    for candidate, model in usable:
        experts = 1 if candidate.expert == "dit" else 2
        if (model, experts) not in seen:
            seen.add((model, experts))
            yield Held(model=model, experts=experts, told_by=candidate.path)


def _by_weights(path: Path, loras: Sequence[LoRAFile]) -> Model | None:
    try:
        weights = open_weights(find_weights(path, stem_of(path)) if path.is_dir() else path)
    except BadCheckpoint:
        return None
    named = identify(weights.shapes())
    if named is None or named[0] != DIT:
        return None
    return model_of(WidenedFile(weights.renamed(named[1]), loras).shapes())


def _by_config(folder: Path) -> Model | None:
    try:
        fields = read_json(folder / "config.json")
    except BadCheckpoint:
        return None
    dim = fields.get("dim") or (fields.get("num_attention_heads") or 0) * (fields.get("attention_head_dim") or 0)
    return Model(kind=_kind(fields), dim=dim) if isinstance(dim, int) and dim else None


def _kind(fields: dict[str, Any]) -> str:
    for kind in ("vace", "animate"):
        if kind in str(fields.get("_class_name")).lower():
            return kind
    if "model_type" in fields:
        return str(fields["model_type"])
    channels = fields.get("in_channels")
    if fields.get("image_dim") is not None or channels == 36:
        return "flf2v" if fields.get("pos_embed_seq_len") is not None else "i2v"
    return "ti2v" if channels == 48 else "t2v"
