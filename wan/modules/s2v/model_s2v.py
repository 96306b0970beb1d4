"""The speech-to-video transformer: the DiT, what it looks back at (an image, frames before), and what it hears.

`WanModel_S2V` has upstream's constructor, call and keys; `SpeechAdapter` appends the tokens and runs the listening
blocks. All that does not change from step to step (speech, reference and motion tokens, their places) is computed once
a condition.

Letters: B batch, C channels, T/H/W latent frames/height/width, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.ops.rope import places_table
from wan.engine.types import Condition, tensor
from wan.modules.blocks import BlockInputs, SideAdapter
from wan.modules.embedding import patchify
from wan.modules.model import FrozenConfig, WanModel
from wan.modules.s2v.audio_utils import LOCAL, WHOLE, AudioInjector_WAN, CausalAudioEncoder, Listening
from wan.modules.s2v.motioner import MOTION_LATENTS, FramePackMotioner, motion_table

__all__ = ["SpeechAdapter", "SpeechCondition", "WanModel_S2V"]

NAME = "s2v"
AUDIO_LAYERS = 25
"""Hidden states of the speech model: its input and those of 24 layers."""

REFERENCE_FRAME = 30
"""Where on the time axis the reference image stands, wherever the video ends."""

NOISY, REFERENCE, MOTION = range(3)
"""Rows of `trainable_cond_mask`: what a token is."""

INJECT_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)

# The one form that was published; a checkpoint of another one would load and give noise.
_PUBLISHED: dict[str, Any] = {
    "enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True, "enable_motioner": False,
    "add_last_motion": True, "enable_tsm": False, "enable_framepack": True, "framepack_drop_mode": "padd",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpeechCondition(Condition):
    """A guidance branch that speaks."""

    audio: Tensor = tensor(time=3, rate=4)
    """[B, layers, A, 4 T] features of the speech model, four a latent frame."""
    reference: Tensor = tensor()
    """[B, C, 1, H, W] latents of the image that shows who speaks."""
    motion: Tensor | None = tensor(default=None)
    """[B, C, M, H, W] latents of what came before; None where nothing did."""
    pose: Tensor | None = tensor(time=2, default=None)
    """[B, C, T, H, W] latents of the pose to take; None stands for zeros."""
    before: tuple[int, int] = (73, MOTION_LATENTS)
    """How many entries of silence (the first one, held) speech is read behind, and how many latent frames they make."""


class SpeechAdapter(SideAdapter):
    """Reference and motion tokens behind those of the video, and after the blocks `layers` what each frame hears."""

    timesteps = (0.0,)
    appends = True

    def __init__(self, injector: AudioInjector_WAN, layers: Sequence[int]) -> None:
        pairs = zip(injector.injector_adain_layers, injector.injector, strict=True)
        super().__init__(nn.ModuleList(Listening(norm, attention) for norm, attention in pairs), layers)  # type: ignore[arg-type]

    def embed(
        self, dit: WanModel, tokens: Tensor, inputs: BlockInputs, condition: Condition
    ) -> tuple[Tensor, BlockInputs]:
        assert isinstance(dit, WanModel_S2V) and isinstance(condition, SpeechCondition)
        kept = partial(_keep, condition, inputs.expert)
        grid = inputs.layout.grid
        local, whole = self._heard(dit, condition, kept, grid[0])
        behind = kept("behind", lambda: _behind(dit, condition))
        rope = kept(f"behind's rope:{grid}", lambda: _behind_table(dit, condition, grid, tokens.device))
        count = behind.shape[1]
        row = torch.full((count,), inputs.constant_rows[0.0], device=tokens.device)
        assert inputs.rows is not None, "a constant timestep makes rows"
        inputs = dataclasses.replace(
            inputs,
            rows=torch.cat((inputs.rows, row)),
            rope=torch.cat((inputs.rope, rope)),
            frames=F.pad(inputs.frames, (0, count), value=-1),
            features=inputs.features | {LOCAL: local, WHOLE: whole},
        )
        return torch.cat((_with_pose(dit, tokens, condition), behind), 1), inputs

    def sides(self, tokens: Tensor, inputs: BlockInputs, condition: Condition) -> None:
        for index, block in zip(self.after, self.blocks, strict=True):
            inputs.residuals[index] = lambda behind, block=block: inputs.run_block(block, behind, inputs)

    @staticmethod
    def _heard(dit: WanModel_S2V, condition: SpeechCondition, kept: Any, frames: int) -> tuple[Tensor, Tensor]:
        """[B, T, N, D] and [B, T, 1, D], in one tensor that is kept."""
        count, skipped = condition.before

        def encode() -> Tensor:
            silence = condition.audio[..., :1].expand(*condition.audio.shape[:-1], count)
            tokens = torch.cat(dit.casual_audio_encoder(torch.cat((silence, condition.audio), -1)), 2)
            return tokens[:, skipped:]

        heard = kept("heard", encode, time=1)
        if heard.shape[1] != frames:
            raise BadRequest(
                f"the sound makes {heard.shape[1]} latent frames, the video has {frames}: "
                f"{condition.audio.shape[-1]} feature entries were given, {4 * frames} are needed"
            )
        return heard[:, :, :-1], heard[:, :, -1:]


def _keep(condition: Condition, expert: str, what: str, make: Any, time: int | None = None) -> Tensor:
    return condition.once(f"{NAME} {what}:{expert}", make, time=time)


def _with_pose(dit: WanModel_S2V, tokens: Tensor, condition: SpeechCondition) -> Tensor:
    """The video's tokens with the pose's, and the mark of what they are."""
    layer = dit.cond_encoder
    assert layer.bias is not None
    if condition.pose is None:
        pose = layer.bias  # what the convolution makes of zeros
    else:
        pose = patchify(condition.pose.to(layer.weight.dtype), layer)
        if pose.shape[1] != tokens.shape[1]:
            raise BadRequest(
                f"pose latents {list(condition.pose.shape)} make {pose.shape[1]} tokens, the video {tokens.shape[1]}: "
                "they must be of one size and length"
            )
    return tokens + pose.float() + dit.trainable_cond_mask.weight[NOISY].float()


def _behind(dit: WanModel_S2V, condition: SpeechCondition) -> Tensor:
    """float32 [B, L, D]: the tokens of the reference image and, if there was any, of the motion before."""
    marks = dit.trainable_cond_mask.weight.float()
    latents = condition.reference.to(dit.patch_embedding.weight.dtype)
    tokens = [patchify(latents, dit.patch_embedding).float() + marks[REFERENCE]]
    if condition.motion is not None:
        tokens.append(dit.frame_packer(condition.motion).float() + marks[MOTION])
    return torch.cat(tokens, 1)


def _behind_table(
    dit: WanModel, condition: SpeechCondition, grid: tuple[int, int, int], device: torch.device
) -> Tensor:
    head_dim = dit.dim // dit.num_heads
    if tuple(condition.reference.shape[2:]) != (1, grid[1] * dit.patch_size[1], grid[2] * dit.patch_size[2]):
        raise BadRequest(
            f"the reference image's latents {list(condition.reference.shape)} are not one frame of the video's size"
        )
    tables = [places_table(([REFERENCE_FRAME], range(grid[1]), range(grid[2])), head_dim, device)]
    if condition.motion is not None:
        tables.append(motion_table(grid[1:], head_dim, device))
    return torch.cat(tables)


class WanModel_S2V(WanModel):  # noqa: N801
    """Upstream's speech-to-video transformer. Source: Wan-S2V, arXiv:2508.18621."""

    def __init__(
        self,
        cond_dim: int = 16, audio_dim: int = 1024, num_audio_token: int = 4, enable_adain: bool = True,
        adain_mode: str = "attn_norm", audio_inject_layers: Sequence[int] = INJECT_LAYERS, zero_init: bool = True,
        zero_timestep: bool = True, enable_motioner: bool = False, add_last_motion: bool = True,
        enable_tsm: bool = False, enable_framepack: bool = True, framepack_drop_mode: str = "padd",
        model_type: str = "s2v", patch_size: tuple[int, int, int] = (1, 2, 2), text_len: int = 512, in_dim: int = 16,
        dim: int = 2048, ffn_dim: int = 8192, freq_dim: int = 256, text_dim: int = 4096, out_dim: int = 16,
        num_heads: int = 16, num_layers: int = 32, window_size: tuple[int, int] = (-1, -1), qk_norm: bool = True,
        cross_attn_norm: bool = True, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        given = {name: value for name, value in locals().items() if name in _PUBLISHED}
        if other := {name: value for name, value in given.items() if value != _PUBLISHED[name]}:
            raise BadCheckpoint(
                f"{other!r} in the configuration: this version runs speech-to-video as it was published, with "
                f"{ {name: _PUBLISHED[name] for name in other}!r}"
            )
        super().__init__(
            model_type, patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads, num_layers,
            window_size, qk_norm, cross_attn_norm, eps,
        )  # fmt: skip
        layers = tuple(audio_inject_layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
            raise BadCheckpoint(
                f"audio_inject_layers {layers!r}: they must rise and stay below the {num_layers} layers of the model"
            )
        self.audio_inject_layers = layers
        own = {
            "cond_dim": cond_dim, "audio_dim": audio_dim, "num_audio_token": num_audio_token, "zero_init": zero_init,
            "audio_inject_layers": list(layers),
        }  # fmt: skip
        self.config = FrozenConfig(self.config | given | own)
        self.cond_encoder = nn.Conv3d(cond_dim, dim, self.patch_size, stride=self.patch_size)
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.casual_audio_encoder = CausalAudioEncoder(audio_dim, AUDIO_LAYERS, dim, num_audio_token)
        self.audio_injector = AudioInjector_WAN(dim, num_heads, len(layers), eps)
        self.frame_packer = FramePackMotioner(dim, in_dim)
        self.adapters[NAME] = SpeechAdapter(self.audio_injector, layers)

    def forward(  # type: ignore[override]
        self,
        x: Sequence[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int,
        ref_latents: Sequence[Tensor] | Tensor,
        motion_latents: Sequence[Tensor] | Tensor,
        cond_states: Sequence[Tensor] | Tensor | None,
        audio_input: Tensor | None = None,
        motion_frames: Sequence[int] = (17, 5),
        add_last_motion: int = 2,
        drop_motion_frames: bool = False,
    ) -> list[Tensor]:
        """Upstream's call: lists of latents [C, T, H, W] or tensors of them; `audio_input` [B, layers, A, K].

        `motion_frames` is how many entries of silence speech is read behind and how many latent frames they make.
        `seq_len` is not looked at, as upstream.
        """
        if audio_input is None:
            raise BadRequest("audio_input is missing: speech-to-video needs features of the speech")
        if add_last_motion != 2:
            raise BadRequest(f"add_last_motion={add_last_motion!r}: all frames before are used here; leave it at 2")
        audio, before = audio_input, (int(motion_frames[0]), int(motion_frames[1]))

        def some(latents: Sequence[Tensor] | Tensor, members: list[int]) -> Tensor:
            return torch.stack([latents[index] for index in members])

        def condition(members: list[int], texts: Tensor) -> SpeechCondition:
            return SpeechCondition(
                context=texts, audio=audio[members], reference=some(ref_latents, members), before=before,
                motion=None if drop_motion_frames else some(motion_latents, members),
                pose=None if cond_states is None else some(cond_states, members),
            )  # fmt: skip

        return self.run_lists(x, t, context, max(seq_len, *(each[0].numel() for each in x)), condition)
