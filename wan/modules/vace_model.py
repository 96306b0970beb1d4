"""VACE: a side stack of blocks that reads a control video and adds hints to the DiT's tokens.

`VaceWanModel` is the DiT with the stack, under upstream's constructor and keys; `VaceAdapter` runs it. A hint is
computed right after the block it belongs to, so that one lives at a time.

Letters: B batch, T/H/W latent frames/height/width, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.types import Condition, tensor
from wan.modules.blocks import BlockInputs, SideAdapter, WanAttentionBlock
from wan.modules.embedding import patchify
from wan.modules.model import FrozenConfig, WanModel

__all__ = ["VaceAdapter", "VaceCondition", "VaceWanAttentionBlock", "VaceWanModel"]

NAME = "vace"


@dataclass(frozen=True, kw_only=True)
class VaceCondition(Condition):
    """A guidance branch with a control video."""

    control: Tensor = tensor(time=2)
    """[B, 96, T, H, W]: what stays, what is made anew (latents of 16 channels each), and the mask's 8x8 pixels."""
    control_scale: Tensor = tensor()
    """[B] how strongly the hints act; 1 as trained."""


class VaceWanAttentionBlock(WanAttentionBlock):
    """A block of the side stack. The first one (`block_id` 0) takes the main tokens and adds the control to them."""

    def __init__(self, *arguments: Any, block_id: int = 0) -> None:
        super().__init__(*arguments)
        self.before_proj = nn.Linear(self.dim, self.dim) if block_id == 0 else None
        self.after_proj = nn.Linear(self.dim, self.dim)
        # Born as zeros: an untrained stack changes nothing.
        for layer in filter(None, (self.before_proj, self.after_proj)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """float32 tokens [B, L, D] of the stack, and the hint [B, L, D] for the main ones.

        The hint is made in here because whoever moves or gathers a block's weights does it around this call.
        """
        if self.before_proj is not None:
            tokens = self.before_proj(inputs.aligned[NAME]) + tokens
        tokens = super().forward(tokens, inputs)
        return tokens, self.after_proj(tokens.to(inputs.context.dtype))


class VaceAdapter(SideAdapter):
    """Runs the side stack that hangs on a DiT as `vace_patch_embedding` and `vace_blocks`."""

    def embed(
        self, dit: WanModel, tokens: Tensor, inputs: BlockInputs, condition: Condition
    ) -> tuple[Tensor, BlockInputs]:
        assert isinstance(condition, VaceCondition), "VACE's transformer runs on a VaceCondition"
        embedding = dit.vace_patch_embedding
        sizes = zip(condition.control.shape[-3:], dit.patch_size, strict=True)
        if (grid := tuple(size // patch for size, patch in sizes)) != inputs.layout.grid:
            raise BadRequest(
                f"control latents {list(condition.control.shape)} make {grid} tokens (frames, rows, columns), the "
                f"latents {inputs.layout.grid}: they must be of one size"
            )
        control = patchify(condition.control.to(embedding.weight.dtype), embedding)
        features = inputs.features | {NAME: condition.control_scale}
        return tokens, dataclasses.replace(inputs, aligned=inputs.aligned | {NAME: control}, features=features)

    def sides(self, tokens: Tensor, inputs: BlockInputs, condition: Condition) -> None:
        scale = inputs.features[NAME].view(-1, 1, 1)
        stack = [tokens.clone()]

        def hint(block: nn.Module) -> Tensor:
            control, hint = inputs.run_block(block, stack.pop(), inputs)
            inputs.aligned.pop(NAME, None)  # read by the first block alone
            if block is not self.blocks[-1]:
                stack.append(control)
            return hint * scale

        for index, block in zip(self.after, self.blocks, strict=True):
            inputs.residuals[index] = lambda tokens, block=block: hint(block)


class VaceWanModel(WanModel):
    """Upstream's VACE transformer: `WanModel` and the side stack. Source: arXiv:2503.07598."""

    def __init__(
        self,
        vace_layers: Sequence[int] | None = None, vace_in_dim: int | None = None,
        model_type: str = "vace", patch_size: tuple[int, int, int] = (1, 2, 2), text_len: int = 512,
        in_dim: int = 16, dim: int = 2048, ffn_dim: int = 8192, freq_dim: int = 256, text_dim: int = 4096,
        out_dim: int = 16, num_heads: int = 16, num_layers: int = 32, window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True, cross_attn_norm: bool = True, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(
            model_type, patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads, num_layers,
            window_size, qk_norm, cross_attn_norm, eps,
        )  # fmt: skip
        layers = tuple(range(0, num_layers, 2)) if vace_layers is None else tuple(vace_layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] != 0 or layers[-1] >= num_layers:
            raise BadCheckpoint(
                f"vace_layers {layers!r}: they must rise from 0 and stay below the {num_layers} layers of the model"
            )
        self.vace_layers = layers
        self.vace_in_dim = in_dim if vace_in_dim is None else vace_in_dim
        self.config = FrozenConfig(self.config | {"vace_layers": list(layers), "vace_in_dim": self.vace_in_dim})
        self.vace_patch_embedding = nn.Conv3d(self.vace_in_dim, dim, self.patch_size, stride=self.patch_size)
        self.vace_blocks = nn.ModuleList(
            VaceWanAttentionBlock(
                "cross", dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps, block_id=index
            )
            for index in range(len(layers))
        )
        self.adapters[NAME] = VaceAdapter(self.vace_blocks, layers)

    def forward(  # type: ignore[override]
        self,
        x: Sequence[Tensor],
        t: Tensor,
        vace_context: Sequence[Tensor],
        context: Sequence[Tensor],
        seq_len: int,
        vace_context_scale: float = 1.0,
        clip_fea: Tensor | None = None,
        y: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Upstream's call: lists of latents [C, T, H, W] and of their control latents [96, T, H, W]."""
        if clip_fea is not None or y is not None:
            raise BadRequest("VACE takes images as reference latents in vace_context; leave clip_fea and y out")

        def condition(members: list[int], texts: Tensor) -> VaceCondition:
            control = torch.stack([vace_context[index] for index in members])
            scale = torch.full((len(members),), float(vace_context_scale), device=control.device)
            return VaceCondition(context=texts, control=control, control_scale=scale)

        return self.run_lists(x, t, context, seq_len, condition)
