"""What image-to-video of Wan 2.1 adds to the DiT: CLIP's tokens of the given images, which every block attends to.

The layers hang on the DiT under upstream's names (`img_emb`, `cross_attn.k_img`, ...), `ImageAdapter` runs them.

Letters: B batch, I image tokens, D width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.types import Condition, tensor
from wan.modules.blocks import Adapter, BlockInputs

if TYPE_CHECKING:
    from wan.modules.model import WanModel

__all__ = ["ImageAdapter", "ImageCondition", "MLPProj"]

NAME = "clip"
CLIP_WIDTH, CLIP_TOKENS = 1280, 257
"""Of one image, by the tower that all published models use."""

BRANCH = {"i2v": (CLIP_WIDTH, 0), "flf2v": (CLIP_WIDTH, 2 * CLIP_TOKENS)}
"""model_type of 2.1 -> width of its image tokens, and how many have a position of their own."""


@dataclass(frozen=True, kw_only=True)
class ImageCondition(Condition):
    """A guidance branch that sees images."""

    image: Tensor | None = tensor(default=None)
    """[B, I, 1280] CLIP's hidden states of one image (I = 257) or, one after the other, of several."""


class MLPProj(nn.Module):
    """Image tokens [B, I, in_dim] to the DiT's width. `positions` of them have an offset of their own, 0 for none."""

    def __init__(self, in_dim: int, out_dim: int, positions: int = 0) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(in_dim), nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim),
        )  # fmt: skip
        self.positions = positions
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, in_dim)) if positions else None

    def forward(self, image: Tensor) -> Tensor:
        """Norms in float32, products in the dtype of the weights, which the result has too."""
        before, expand, activation, contract, after = self.proj
        if self.emb_pos is not None:
            if image.shape[1] != self.positions:
                raise BadRequest(f"{image.shape[1]!r} image tokens; this model takes {self.positions}: two images")
            image = image + self.emb_pos
        x: Tensor = expand(_norm(image, before).to(expand.weight.dtype))
        return _norm(contract(activation(x)), after).to(x.dtype)


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x.float(), layer.normalized_shape, layer.weight.float(), layer.bias.float(), layer.eps)


class ImageAdapter(Adapter):
    """Hands the embedded image tokens to the blocks, as `inputs.features["clip"]`."""

    def embed(
        self, dit: WanModel, tokens: Tensor, inputs: BlockInputs, condition: Condition
    ) -> tuple[Tensor, BlockInputs]:
        image = condition.image if isinstance(condition, ImageCondition) else None
        if image is None:
            raise BadRequest("this model looks at an image through CLIP; pass its hidden states (clip_fea)")
        embedded = condition.once(f"image:{inputs.expert}", lambda: dit.img_emb(image))  # type: ignore[operator]
        return tokens, dataclasses.replace(inputs, features=inputs.features | {NAME: embedded})
