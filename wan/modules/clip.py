"""CLIP's image tower (ViT-H/14), which shows given images to the image-to-video models of 2.1 and to Animate.

Upstream's names and keys; of its two-tower file only the image tower is read. Sizes come from the weights.

Letters: B images, I tokens of an image (257: a class token and 16 x 16 patches), D width, N heads.
Source: Dosovitskiy et al. 2020, arXiv:2010.11929; Radford et al. 2021, arXiv:2103.00020.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.ops.attention import sdpa
from wan.engine.weights.dialects import CLIP, open_network
from wan.engine.weights.stream import load_into
from wan.modules.tokenizers import HuggingfaceTokenizer

__all__ = ["CLIPModel", "VisionTransformer", "build_clip", "look"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels, in 0..1, that the published tower was trained on."""

HEAD_DIM = 80
"""Of the published tower; shapes do not tell it."""

TEXT_LEN = 512


class LayerNorm(nn.LayerNorm):
    """Computed in float32, returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention among the tokens of an image; one layer makes queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out: Tensor = self.proj(sdpa(q, k, v).flatten(2))
        return out


class AttentionBlock(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, dim: int, mlp_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Pixels [B, 3, S, S], normalised, to hidden states [B, I, D]; `head` and `post_norm` are not applied."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        dim: int = 1280,
        mlp_dim: int = 5120,
        out_dim: int = 1024,
        num_heads: int = 16,
        num_layers: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if image_size % patch_size or dim % num_heads:
            raise BadCheckpoint(
                f"CLIP of {image_size} pixels in patches of {patch_size}, {dim} wide with {num_heads} heads: neither "
                "may leave a rest"
            )
        self.image_size, self.patch_size, self.dim = image_size, patch_size, dim
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)
        gain = 1.0 / math.sqrt(dim)
        self.cls_embedding = nn.Parameter(gain * torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(gain * torch.randn(1, 1 + (image_size // patch_size) ** 2, dim))
        self.pre_norm = LayerNorm(dim, eps=eps)
        self.transformer = nn.Sequential(*(AttentionBlock(dim, mlp_dim, num_heads, eps) for _ in range(num_layers)))
        self.post_norm = LayerNorm(dim, eps=eps)
        self.head = nn.Parameter(gain * torch.randn(dim, out_dim)) if out_dim else None

    def forward(self, x: Tensor, interpolation: bool = False, use_31_block: bool = False) -> Tensor:
        """With `use_31_block` the last block is left out, as the video models want it."""
        x = self.patch_embedding(x.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_embedding.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        x = self.pre_norm(x + self.pos_embedding.to(x.dtype))
        blocks = list(self.transformer)
        for block in blocks[:-1] if use_31_block else blocks:
            x = block(x)
        return x


class ImageTower(nn.Module):
    """The image tower under the name it has in the published file."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.visual = VisionTransformer(**sizes)


def build_clip(shapes: Mapping[str, Sequence[int]]) -> ImageTower:
    """The tower of these shapes (upstream's keys) on the meta device. Raises BadCheckpoint."""
    try:
        dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
        tokens, mlp = shapes["visual.pos_embedding"][1], shapes["visual.transformer.0.mlp.0.weight"][0]
    except (KeyError, ValueError, IndexError) as missing:
        raise BadCheckpoint(f"not CLIP's image tower: {missing} is not among its {len(shapes)} weights") from missing
    blocks = {key.split(".")[2] for key in shapes if key.startswith("visual.transformer.")}
    with torch.device("meta"):
        return ImageTower(
            image_size=math.isqrt(tokens - 1) * patch, patch_size=patch, dim=dim, mlp_dim=mlp,
            out_dim=shapes.get("visual.head", (0, 0))[1],
            num_heads=max(1, dim // HEAD_DIM), num_layers=len(blocks),
        ).eval()  # fmt: skip


def look(tower: VisionTransformer, videos: Sequence[Tensor]) -> Tensor:
    """Hidden states [B, I, D], before the last block, of all frames of `videos` [3, F, H, W] in -1..1.

    Every frame is squeezed to the tower's square, whatever its shape, as the models were trained.
    """
    side = (tower.image_size, tower.image_size)
    weight = tower.patch_embedding.weight
    frames = [video.to(weight.device, torch.float32).transpose(0, 1) for video in videos]
    pixels = torch.cat([F.interpolate(each, size=side, mode="bicubic", align_corners=False) for each in frames])
    return tower(_normalised(pixels * 0.5 + 0.5), use_31_block=True)


def _normalised(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in 0..1 as the tower takes them."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


class CLIPModel:
    """Upstream's CLIP: `.visual(videos)` gives hidden states [B, 257, 1280], `.model`, `.transforms`, `.tokenizer`.

    `checkpoint_path` is models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or a file with the same weights,
    `tokenizer_path` the folder xlm-roberta-large, which is looked at when `.tokenizer` is asked for.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str | int,
        checkpoint_path: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.checkpoint_path, self.tokenizer_path = checkpoint_path, tokenizer_path
        weights = open_network(Path(checkpoint_path), CLIP)
        model, where = build_clip(weights.shapes()), self.device
        load_into(model, weights.stream(), dtype=lambda key: dtype, place=lambda key, value: where)
        self.model = model.requires_grad_(False)

    @classmethod
    def of(cls, model: nn.Module) -> CLIPModel:
        """The same interface over a network that stands already."""
        self = cls.__new__(cls)
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.checkpoint_path, self.tokenizer_path = "", None
        self.model = model  # type: ignore[assignment]
        return self

    def visual(self, videos: Sequence[Tensor]) -> Tensor:
        """Hidden states [B, 257, 1280] of all frames of `videos` [3, F, H, W] in -1..1."""
        return look(self.model.visual, videos)

    def transforms(self, image: Any) -> Tensor:
        """A PIL image as the tower takes it, [3, 224, 224]."""
        from PIL import Image

        side = self.model.visual.image_size
        small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(1, side, side, 3)
        return _normalised(pixels.permute(0, 3, 1, 2).float() / 255)[0]

    @cached_property
    def tokenizer(self) -> HuggingfaceTokenizer:
        """XLM-R's tokenizer; no video model calls it. Raises BadCheckpoint."""
        if self.tokenizer_path is None:
            raise BadCheckpoint("CLIPModel was made without tokenizer_path: pass the folder xlm-roberta-large")
        return HuggingfaceTokenizer(self.tokenizer_path, seq_len=TEXT_LEN, clean="whitespace")
