"""The sizes of a checkpoint's networks, as a prediction takes them, from modules on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from wan.engine.engine import main_dtype, on_meta
from wan.engine.ops.float8 import Float8Linear
from wan.engine.plan import Optimization
from wan.engine.prediction import Models
from wan.engine.roofline import VAE, TextEncoder, Transformer
from wan.engine.types import Component
from wan.modules.model import WanModel
from wan.modules.vae import WanVAEModel

CLIP_TOKENS = 257
"""Tokens CLIP makes of a picture; networks with positions for them say how many they take."""


def models_of(
    components: Iterable[Component], active: Sequence[Optimization] = (), *, float8: Optimization | None = None
) -> Models:
    """The sizes of these networks as `active` has them stored, the transformers' also as `float8` would."""
    by_name = {component.name: component for component in components}
    experts = [component for component in by_name.values() if component.is_expert]
    text, vae, clip = (by_name.get(name) for name in ("text_encoder", "vae", "clip"))
    assert text is not None and vae is not None, "every checkpoint has both"
    return Models(
        transformer=_transformer(experts[0], active),
        text=_text_encoder(text, active),
        vae=_vae(vae),
        experts=len(experts),
        clip_bytes=0 if clip is None else _bytes(clip.build(), clip.dtype),
        float8=None if float8 is None else _transformer(experts[0], (*active, float8)),
    )


def _transformer(component: Component, active: Sequence[Optimization]) -> Transformer:
    module = cast(WanModel, on_meta(component, active))
    blocks = [_stored(block) for block in module.all_blocks()]
    whole = [size for size in blocks if size >= blocks[0]]  # smaller ones only listen, to speech or a face
    image, positions = module.config.image_dim, module.config.image_positions
    return Transformer(
        dim=module.dim, ffn_dim=module.ffn_dim, num_heads=module.num_heads, num_blocks=len(whole),
        in_channels=module.in_dim, out_channels=module.out_dim, text_len=module.text_len, text_dim=module.text_dim,
        num_bytes=_stored(module), block_bytes=max(blocks), blocks_bytes=tuple(blocks),
        image_tokens=(positions or CLIP_TOKENS) if image else 0,
        side_streams=int(len(whole) > len(module.blocks)), patch=module.patch_size,
        element_size=main_dtype(module).itemsize, coded=_coded(module),
    )  # fmt: skip


def _text_encoder(component: Component, active: Sequence[Optimization]) -> TextEncoder:
    module = on_meta(component, active)
    layers = cast(nn.ModuleList, module.blocks)
    return TextEncoder(
        num_bytes=_stored(module), num_layers=len(layers), layer_bytes=_stored(layers[0]),
        element_size=1 if _coded(module) else component.dtype.itemsize,
    )  # fmt: skip


def _vae(component: Component) -> VAE:
    module = cast(WanVAEModel, component.build())
    fields: dict[str, Any] = vars(module.config)
    return VAE(num_bytes=_bytes(module, component.dtype), element_size=component.dtype.itemsize, **fields)


def _coded(module: nn.Module) -> int:
    """How many weights are kept in 8 bits."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, Float8Linear))


def _stored(module: nn.Module) -> int:
    """Bytes of a module's parameters in the dtypes they have."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
