"""Wan-Animate: the image-to-video DiT that follows a skeleton, added to its patches, and a face, looked at in blocks.

`WanAnimateModel` is the DiT with these parts under upstream's constructor and keys; `AnimateAdapter` runs them. The
face is encoded once for a video, not in every step. Source: Wan Team 2025, arXiv:2509.14055.

Letters: B batch, K video frames of the face, T/H/W latent frames/height/width, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.types import Condition, tensor
from wan.modules.animate.face_blocks import FACE, FaceAdapter, FaceEncoder
from wan.modules.animate.motion_encoder import Generator
from wan.modules.blocks import BlockInputs, SideAdapter
from wan.modules.embedding import patchify
from wan.modules.image_embedding import CLIP_WIDTH, ImageCondition
from wan.modules.model import FrozenConfig, WanModel

__all__ = ["AnimateAdapter", "AnimateCondition", "WanAnimateModel", "led_by_reference"]

NAME = "animate"
CHUNK = 4
"""Video frames a latent frame, but for the first one."""

MOTION_WIDTHS = (32, 64, 128, 256, 512, 512, 512, 512)
MOTION_DIM, FACE_WIDTH, FACE_HEADS, FACE_EVERY = 20, 1024, 4, 5
POSE_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class AnimateCondition(ImageCondition):
    """A guidance branch with a skeleton and a face. Latent frame 0 is the reference picture, which has neither.

    What stands for it in `pose` and `face` keeps them aligned with the latents and is never looked at: a latent frame,
    and the four video frames that `led_by_reference` puts in front.
    """

    pose: Tensor = tensor(time=2)
    """[B, 16, T, H, W] latents of the skeleton's video."""
    face: Tensor = tensor(time=2, rate=CHUNK, first=1)
    """[B, 3, 4 + K, S, S] pictures of the face in -1..1, K = 4 (T - 1) - 3."""


def led_by_reference(pose: Tensor, face: Tensor) -> dict[str, Tensor]:
    """The fields of an `AnimateCondition` for pose [B, 16, T - 1, H, W] and face [B, 3, K, S, S] of the video."""
    return {"pose": F.pad(pose, (0, 0, 0, 0, 1, 0)), "face": F.pad(face, (0, 0, 0, 0, CHUNK, 0))}


class AnimateAdapter(SideAdapter):
    """Runs `pose_patch_embedding`, `motion_encoder`, `face_encoder` and `face_adapter`, which belong to the DiT."""

    def __init__(self, blocks: nn.ModuleList, every: int) -> None:
        super().__init__(blocks, range(0, every * len(blocks), every))

    def embed(
        self, dit: WanModel, tokens: Tensor, inputs: BlockInputs, condition: Condition
    ) -> tuple[Tensor, BlockInputs]:
        assert isinstance(dit, WanAnimateModel) and isinstance(condition, AnimateCondition)
        frames, rows, columns = inputs.layout.grid
        pose = patchify(condition.pose.to(dit.pose_patch_embedding.weight.dtype), dit.pose_patch_embedding)
        if pose.shape[1] != frames * rows * columns:
            raise BadRequest(
                f"pose latents {list(condition.pose.shape)} do not fit the video, whose latents make {frames} frames "
                f"of {rows}x{columns} tokens: both must be of one size and length"
            )
        reference = rows * columns
        tokens = torch.cat((tokens[:, :reference], tokens[:, reference:] + pose[:, reference:]), 1)
        face = condition.once(f"face:{inputs.expert}", lambda: dit.encode_face(condition.face[:, :, CHUNK:]), time=1)
        if face.shape[1] != frames:
            raise BadRequest(
                f"{condition.face.shape[2] - CHUNK} frames of the face make {face.shape[1] - 1} latent frames and the "
                f"video has {frames - 1}: both must be equally long"
            )
        return tokens, dataclasses.replace(inputs, features=inputs.features | {FACE: face})

    def sides(self, tokens: Tensor, inputs: BlockInputs, condition: Condition) -> None:
        for index, block in zip(self.after, self.blocks, strict=True):
            inputs.residuals[index] = partial(_run, block, inputs)


def _run(block: nn.Module, inputs: BlockInputs, tokens: Tensor) -> Tensor:
    added: Tensor = inputs.run_block(block, tokens, inputs)
    return added


class WanAnimateModel(WanModel):
    """Upstream's Animate transformer. Its arguments, and by keyword the sizes that upstream has no argument for.

    `motion_widths` are the channels of the motion encoder at each size, `face_every` the distance of face blocks.
    """

    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2), text_len: int = 512, in_dim: int = 36, dim: int = 5120,
        ffn_dim: int = 13824, freq_dim: int = 256, text_dim: int = 4096, out_dim: int = 16, num_heads: int = 40,
        num_layers: int = 40, window_size: tuple[int, int] = (-1, -1), qk_norm: bool = True,
        cross_attn_norm: bool = True, eps: float = 1e-6, motion_encoder_dim: int = 512,
        use_context_parallel: bool = False, use_img_emb: bool = True, *, image_dim: int = CLIP_WIDTH,
        motion_widths: Sequence[int] = MOTION_WIDTHS, motion_dim: int = MOTION_DIM, face_dim: int = FACE_WIDTH,
        face_heads: int = FACE_HEADS, face_every: int = FACE_EVERY,
    ) -> None:  # fmt: skip
        super().__init__(
            "animate", patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads, num_layers,
            window_size, qk_norm, cross_attn_norm, eps, image_dim=image_dim if use_img_emb else 0,
        )  # fmt: skip
        own = {
            "motion_encoder_dim": motion_encoder_dim, "use_img_emb": use_img_emb, "motion_widths": list(motion_widths),
            "motion_dim": motion_dim, "face_dim": face_dim, "face_heads": face_heads, "face_every": face_every,
        }  # fmt: skip
        self.config = FrozenConfig(self.config | own)
        if face_every < 1 or num_layers % face_every:
            raise BadCheckpoint(f"{num_layers!r} layers cannot have one face block for every {face_every!r} of them")
        self.pose_patch_embedding = nn.Conv3d(POSE_CHANNELS, dim, self.patch_size, stride=self.patch_size)
        self.motion_encoder = Generator(motion_widths, motion_dim, motion_encoder_dim)
        self.face_adapter = FaceAdapter(dim, num_heads, num_layers // face_every)
        self.face_encoder = FaceEncoder(motion_encoder_dim, face_dim, face_heads, dim)
        self.adapters[NAME] = AnimateAdapter(self.face_adapter.fuser_blocks, face_every)

    @property
    def face_size(self) -> int:
        """Pixels a side of the pictures of the face."""
        return self.motion_encoder.size

    def encode_face(self, face: Tensor) -> Tensor:
        """Pictures [B, 3, K, S, S] in -1..1 -> float32 [B, T, tokens, D]; the reference's come first and are zeros."""
        motions = self.motion_encoder(face.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(face), -1))
        return F.pad(self.face_encoder(motions), (0, 0, 0, 0, 1, 0))

    def forward(  # type: ignore[override]
        self,
        x: Sequence[Tensor],
        t: Tensor,
        clip_fea: Tensor,
        context: Sequence[Tensor],
        seq_len: int,
        y: Sequence[Tensor] | None = None,
        pose_latents: Sequence[Tensor] | Tensor | None = None,
        face_pixel_values: Tensor | None = None,
    ) -> list[Tensor]:
        """Upstream's call: lists of latents [16, T, H, W], of y [20, T, H, W] and of pose latents [16, T - 1, H, W].

        `clip_fea` is [B, 257, 1280], `face_pixel_values` [B, 3, K, S, S] in -1..1.
        """
        if y is None or pose_latents is None or face_pixel_values is None:
            raise BadRequest("Animate's transformer needs y, pose_latents and face_pixel_values")
        poses, faces = pose_latents, face_pixel_values

        def condition(members: list[int], texts: Tensor) -> AnimateCondition:
            pose = torch.stack([poses[index] for index in members])
            return AnimateCondition(context=texts, image=clip_fea[members], **led_by_reference(pose, faces[members]))

        whole = [torch.cat((latents, extra)) for latents, extra in zip(x, y, strict=True)]
        return self.run_lists(whole, t, context, seq_len, condition)

    @staticmethod
    def own_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        convs = "motion_encoder.enc.net_app.convs"
        first, out = shapes.get(f"{convs}.0.0.weight"), shapes.get("motion_encoder.dec.direction.weight")
        local, hidden = shapes.get("face_encoder.conv1_local.conv.weight"), shapes.get("face_encoder.conv2.conv.weight")
        layers = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
        count = len({key.split(".")[2] for key in shapes if key.startswith("face_adapter.fuser_blocks.")})
        if first is None or out is None or local is None or hidden is None or not count:
            return {}
        after = [shapes[key][0] for n in range(1, len(shapes)) if (key := f"{convs}.{n}.conv2.1.weight") in shapes]
        return {
            "motion_widths": (first[0], *after), "motion_encoder_dim": out[0], "motion_dim": out[1],
            "face_dim": hidden[0], "face_heads": local[0] // hidden[0], "face_every": len(layers) // count,
        }  # fmt: skip
