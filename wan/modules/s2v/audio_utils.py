"""How speech enters the DiT: features of a speech model become a few tokens a latent frame, which blocks listen to.

Parameter names are upstream's, "casual" for causal among them, because checkpoints have them.

Letters: B batch, L tokens, T latent frames, A width of the features, K feature entries, D width, N tokens that a frame
hears.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.ops.frames import attend_own_frame
from wan.engine.ops.modulate import norm_modulate
from wan.modules.blocks import BlockInputs, WanCrossAttention
from wan.modules.embedding import linear32

__all__ = ["LOCAL", "WHOLE", "AudioInjector_WAN", "CausalAudioEncoder", "Listening", "MotionEncoder_tc"]

LOCAL, WHOLE = "s2v.local", "s2v.whole"
"""Names in `BlockInputs.features` of the tokens a frame hears [B, T, N, D], and of what sets its mood [B, T, 1, D]."""

ADAIN_EPS = 1e-5


class CausalConv1d(nn.Module):
    """Convolution over time that sees the past alone; before the beginning everything is as in the first entry."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, K, A] -> [B, K / stride (rounded up), A']."""
        past = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0), mode="replicate")
        bias = None if self.conv.bias is None else self.conv.bias.float()
        return F.conv1d(past, self.conv.weight.float(), bias, self.conv.stride).transpose(1, 2)


class MotionEncoder_tc(nn.Module):  # noqa: N801
    """Features become, four entries at a time, `num_heads` tokens of their own, one learned, and one of the whole."""

    def __init__(self, in_dim: int, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.conv1_local = CausalConv1d(in_dim, hidden_dim // 4 * num_heads)
        self.conv1_global = CausalConv1d(in_dim, hidden_dim // 4)
        self.conv2 = CausalConv1d(hidden_dim // 4, hidden_dim // 2, stride=2)
        self.conv3 = CausalConv1d(hidden_dim // 2, hidden_dim, stride=2)
        self.final_linear = nn.Linear(hidden_dim, hidden_dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, hidden_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, K, A] -> [B, T, N + 1, D] and [B, T, 1, D]."""
        local = self.conv1_local(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        local = self._shorten(local.flatten(0, 1)).unflatten(0, (-1, self.num_heads)).transpose(1, 2)
        padding = self.padding_tokens.float().expand(*local.shape[:2], 1, -1)
        whole = linear32(self.final_linear, self._shorten(self.conv1_global(x)))
        return torch.cat((local, padding), 2), whole[:, :, None]

    def _shorten(self, x: Tensor) -> Tensor:
        for layer in (self.conv2, self.conv3):
            x = layer(_activated(x))
        return _activated(x)


def _activated(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class CausalAudioEncoder(nn.Module):
    """The layers of a speech model, mixed by learned weights, as tokens of latent frames. Computes in float32."""

    def __init__(self, dim: int, num_layers: int, out_dim: int, num_token: int) -> None:
        super().__init__()
        self.encoder = MotionEncoder_tc(dim, out_dim, num_token)
        self.weights = nn.Parameter(torch.full((1, num_layers, 1, 1), 0.01))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, layers, A, K] -> [B, T, N, D] and [B, T, 1, D], T = K / 4 rounded up twice."""
        expected = self.weights.shape[1], self.encoder.conv1_local.conv.in_channels
        if tuple(features.shape[1:3]) != expected:
            raise BadRequest(
                f"the speech model makes {features.shape[1]} layers of width {features.shape[2]}, this transformer "
                f"hears {expected[0]} of width {expected[1]}: they do not belong together"
            )
        share = F.silu(self.weights.float())
        mixed = (features.float() * share).sum(1) / share.sum(1)
        return self.encoder(mixed.transpose(1, 2))


class AdaLayerNorm(nn.Module):
    """The projection that makes shift and scale of a norm from an embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, tokens: Tensor, mood: Tensor, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """float32: tokens [B, L, D] normed, shifted and scaled by what mood [B, T, 1, D] says of their frame."""
        shift, scale = self.linear(F.silu(mood[:, :, 0]).to(dtype)).float().chunk(2, -1)
        return norm_modulate(tokens, shift, scale, frames, ADAIN_EPS)


class AudioCrossAttention(WanCrossAttention):
    """Attention of the tokens of a frame to what that frame hears."""

    role = "audio"

    def listen(self, x: Tensor, heard: Tensor, frames: Tensor) -> Tensor:
        """x [B, L, D], heard [B, T, N, D], frames [L] -> [B, L, D]."""
        q = self.heads(self.norm_q(self.q(x)))
        k, v = self.heads(self.norm_k(self.k(heard))), self.heads(self.v(heard))
        out: Tensor = self.o(attend_own_frame(q.to(v.dtype), k.to(v.dtype), v, frames).flatten(2))
        return out


class Listening(nn.Module):
    """What a block hears: one attention of the injector and the norm before it, run as a block of their own.

    Both belong to the DiT's `audio_injector`, under upstream's names; this only holds them together.
    """

    def __init__(self, norm: AdaLayerNorm, attention: AudioCrossAttention) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """What to add to tokens [B, L, D]; nothing to those of no frame."""
        dtype, inside = inputs.context.dtype, inputs.frames >= 0
        frames = inputs.frames.clamp(min=0)
        x = self.norm(tokens, inputs.features[WHOLE], frames, dtype).to(dtype)
        heard = self.attention.listen(x, inputs.features[LOCAL].to(dtype), inputs.frames)
        return heard * inside[:, None]


class AudioInjector_WAN(nn.Module):  # noqa: N801
    """The attentions to speech, one a listening block, and the norms before them."""

    def __init__(self, dim: int, num_heads: int, count: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.injector = nn.ModuleList(AudioCrossAttention(dim, num_heads, eps=eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaLayerNorm(dim) for _ in range(count))
