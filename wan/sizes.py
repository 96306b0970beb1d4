"""The sizes of a checkpoint's networks, as a prediction takes them, from modules on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from wan.engine.prediction import Models
from wan.engine.roofline import VAE, TextEncoder, Transformer
from wan.engine.types import Component
from wan.modules.model import WanModel
from wan.modules.vae import WanVAEModel

CLIP_TOKENS = 257
"""Tokens CLIP makes of a picture; networks with positions for them say how many they take."""


def models_of(components: Iterable[Component], *, param_dtype: torch.dtype | None = None) -> Models:
    """The sizes of these networks; `param_dtype` replaces the transformers' own."""
    by_name = {component.name: component for component in components}
    experts = [component for component in by_name.values() if component.is_expert]
    text, vae, clip = (by_name.get(name) for name in ("text_encoder", "vae", "clip"))
    assert text is not None and vae is not None, "every checkpoint has both"
    return Models(
        transformer=_transformer(experts[0], param_dtype or experts[0].dtype),
        text=_text_encoder(text),
        vae=_vae(vae),
        experts=len(experts),
        clip_bytes=0 if clip is None else _bytes(clip.build(), clip.dtype),
    )


def _transformer(component: Component, dtype: torch.dtype) -> Transformer:
    module = cast(WanModel, component.build())
    sizes = [
        (id(p), p.numel() * (4 if component.float32(key) else dtype.itemsize)) for key, p in module.named_parameters()
    ]
    of = dict(sizes)
    blocks = [sum(of[id(p)] for p in block.parameters()) for block in module.all_blocks()]
    whole = [size for size in blocks if size >= blocks[0]]  # smaller ones only listen, to speech or a face
    image, positions = module.config.image_dim, module.config.image_positions
    return Transformer(
        dim=module.dim, ffn_dim=module.ffn_dim, num_heads=module.num_heads, num_blocks=len(whole),
        in_channels=module.in_dim, out_channels=module.out_dim, text_len=module.text_len, text_dim=module.text_dim,
        num_bytes=sum(of.values()), block_bytes=max(blocks), blocks_bytes=tuple(blocks),
        image_tokens=(positions or CLIP_TOKENS) if image else 0,
        side_streams=int(len(whole) > len(module.blocks)), patch=module.patch_size, element_size=dtype.itemsize,
    )  # fmt: skip


def _text_encoder(component: Component) -> TextEncoder:
    module = component.build()
    layers = cast(nn.ModuleList, module.blocks)
    return TextEncoder(
        num_bytes=_bytes(module, component.dtype), num_layers=len(layers),
        layer_bytes=_bytes(layers[0], component.dtype), element_size=component.dtype.itemsize,
    )  # fmt: skip


def _vae(component: Component) -> VAE:
    module = cast(WanVAEModel, component.build())
    fields: dict[str, Any] = vars(module.config)
    return VAE(num_bytes=_bytes(module, component.dtype), element_size=component.dtype.itemsize, **fields)


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
