"""Which model a transformer's weights make, told by keys and shapes: config files call several models by one name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

_MARKS = (
    ("vace", r"vace_"),
    ("animate", r"face_adapter\.|face_encoder\.|pose_patch_embedding\."),
    ("s2v", r"casual_audio_encoder\.|audio_injector\."),
    ("flf2v", r"img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed"),
    ("i2v", r"img_emb\.|condition_embedder\.image_embedder\."),
)
"""Kind and how a weight's name begins that no other kind has; the first row that fits counts."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer: `kind` as in a task's name, `dim` its width."""

    kind: str
    dim: int


def model_of(shapes: Shapes) -> Model | None:
    """The model with these shapes (under our names); None where there is no patch embedding to tell by.

    Text-to-video has no key of its own. Image-to-video of 2.2 differs from it by its input channels alone: latents, a
    mask of 4 channels and the image's latents.
    """
    patch = shapes.get("patch_embedding.weight", ())
    if len(patch) != 5:
        return None
    for kind, begins in _MARKS:
        if any(re.match(begins, key.rpartition("diffusion_model.")[2]) for key in shapes):
            return Model(kind=kind, dim=patch[0])
    head = shapes.get("head.head.weight", (0,))[0]
    channels, latent = patch[1], head // (patch[2] * patch[3] * patch[4])
    if latent and channels == 2 * latent + 4:
        return Model(kind="i2v", dim=patch[0])
    if latent and channels != latent:
        return Model(kind=f"{channels}-channel", dim=patch[0])
    return Model(kind="ti2v" if channels == 48 else "t2v", dim=patch[0])


def is_umt5(shapes: Shapes) -> bool:
    """Whether every layer has a table of relative positions, as in umT5; T5 has one for all."""
    layers = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    return bool(layers) and all(f"blocks.{n}.pos_embedding.embedding.weight" in shapes for n in layers)
