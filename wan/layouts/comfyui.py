"""ComfyUI's `models` folder: single files for all programs and models, so the right ones are found by their keys.

Two experts differ in their file names alone (`high_noise`, `low_noise`). Where several files would do, the user
chooses; a file in 8 bits is taken where there is no other, and where only GGUF or 4 bits would do, the error says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wan.engine.errors import BadCheckpoint
from wan.engine.weights import dialects
from wan.engine.weights.dialects import CLIP, DIT, TEXT_ENCODER, VAE
from wan.engine.weights.files import SAFETENSORS, SHARD
from wan.engine.weights.quantised import is_float8
from wan.engine.weights.stream import open_weights
from wan.layouts.models import Model, Shapes, is_umt5, model_of

FOLDERS = {
    DIT: ("diffusion_models", "unet"), TEXT_ENCODER: ("text_encoders", "clip"), VAE: ("vae",), CLIP: ("clip_vision",),
}  # fmt: skip
FLAGS = {DIT: "dit", "high": "dit", "low": "dit_low", TEXT_ENCODER: "t5", VAE: "vae", CLIP: "clip"}

_NAMED = {DIT: "wan", TEXT_ENCODER: "umt5", VAE: "wan", CLIP: "clip_vision"}
"""How files are called in which nothing can be read, and which is preferred among files of the same shapes."""
_SIDE = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The transformers a task needs, and what it shares with others."""

    kind: str
    dim: int
    experts: tuple[str, ...]
    shared: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file that could be a part: its shapes and whether its weights are in 8 bits, or why it cannot be used."""

    path: Path
    shapes: Shapes = field(default_factory=dict)
    refused: str = ""
    float8: bool = False

    @property
    def model(self) -> Model | None:
        return model_of(self.shapes)

    @property
    def expert(self) -> str:
        """ "high" or "low" by the file's name, else "dit"."""
        sides = {side.lower() for side in _SIDE.findall(self.path.stem)}
        return sides.pop() if len(sides) == 1 else "dit"


def root_of(folder: Path) -> Path | None:
    """The models folder: `folder` or the `models` in it; None where neither is one."""
    for root in (folder, folder / "models"):
        if any((root / name).is_dir() for name in FOLDERS[DIT]):
            return root
    return None


def paths(root: Path, wanted: Wanted, given: Mapping[str, Path]) -> dict[str, Path | None]:
    """Part -> file; None for what is nowhere. `given` parts are not looked for."""
    places: dict[str, Path | None] = {}
    transformers = [] if all(expert in given for expert in wanted.experts) else candidates(root, DIT)
    for expert in wanted.experts:
        fitting = [each for each in transformers if each.expert == expert and _is(each, wanted)]
        places[expert] = given.get(expert) or _only(fitting, expert, root)
    first = next((path for path in places.values() if path is not None), None)
    shapes = _shapes(first, DIT) if first is not None else {}
    for network in (each for each in (TEXT_ENCODER, VAE, CLIP) if each in wanted.shared):
        fitting = [] if network in given else [each for each in candidates(root, network) if _goes_with(each, shapes)]
        places[network] = given.get(network) or _only(fitting, network, root)
    return places | {"tokenizer": given.get("tokenizer")}


def candidates(root: Path, network: str) -> list[Candidate]:
    """The files under `root` that hold such a network, by their headers, usable or not."""
    found = []
    for name in FOLDERS[network]:
        for path in sorted((root / name).rglob("*")):
            shard = SHARD.fullmatch(path.name)
            if path.suffix in (*SAFETENSORS, ".pth", ".gguf") and (not shard or "-00001-of-" in path.name):
                found += _candidate(path, network)
    return found


def _candidate(path: Path, network: str) -> list[Candidate]:
    try:
        weights = open_weights(path)
    except BadCheckpoint as error:
        return [Candidate(path=path, refused=str(error))] if _NAMED[network] in path.name.lower() else []
    named = dialects.identify(weights.shapes())
    if named is None or named[0] != network:
        return []
    try:
        shapes = dialects.under_our_names(weights, named[1]).shapes()
    except BadCheckpoint as error:
        return [Candidate(path=path, shapes=weights.renamed(named[1]).shapes(), refused=str(error))]
    return [Candidate(path=path, shapes=shapes, float8=is_float8(weights))]


def _is(candidate: Candidate, wanted: Wanted) -> bool:
    model = candidate.model
    return model == Model(kind=wanted.kind, dim=wanted.dim) if model else bool(candidate.refused)


def _goes_with(candidate: Candidate, transformer: Shapes) -> bool:
    """Whether a text encoder is as wide as the transformer's text, or a VAE has its latents."""
    shapes = candidate.shapes
    if not shapes:
        return bool(candidate.refused)
    if "token_embedding.weight" in shapes:
        width = transformer.get("text_embedding.0.weight", shapes["token_embedding.weight"])[-1]
        return is_umt5(shapes) and shapes["token_embedding.weight"][-1] == width
    if "visual.cls_embedding" in shapes:
        return shapes["visual.cls_embedding"][-1] == transformer.get("img_emb.proj.0.weight", (0,))[0]
    channels = shapes.get("conv2.weight", (0,))[0]
    patch, head = transformer.get("patch_embedding.weight", ()), transformer.get("head.head.weight", (0,))
    return not patch or channels * patch[2] * patch[3] * patch[4] == head[0]


def _only(found: list[Candidate], part: str, root: Path) -> Path | None:
    """The one file to use. Raises BadCheckpoint where there are several, or none but refused ones."""
    network = part if part in _NAMED else DIT
    usable = [each for each in found if not each.refused]
    usable = [each for each in usable if not each.float8] or usable
    if len(usable) > 1:
        named = [each for each in usable if _NAMED[network] in each.path.name.lower()]
        usable = named if len(named) == 1 else usable
    if len(usable) > 1:
        names = ", ".join(str(each.path.relative_to(root)) for each in usable)
        raise BadCheckpoint(f"{str(root)!r} has several files that fit: {names}; choose one with --{FLAGS[part]}")
    if usable:
        return usable[0].path
    if found:
        raise BadCheckpoint(found[0].refused)
    return None


def _shapes(path: Path, network: str) -> Shapes:
    return dialects.open_network(path, network).shapes()
