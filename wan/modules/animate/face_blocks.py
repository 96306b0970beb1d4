"""How a face's motion enters the DiT: a few tokens for each latent frame, and blocks in which the frame looks at them.

Letters: B batch, L tokens, K motions (one a video frame), T latent frames, S tokens of a face in a latent frame, N
heads, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.frames import attend_own_frame
from wan.modules.blocks import BlockInputs, WanLayerNorm, WanRMSNorm
from wan.modules.embedding import linear32
from wan.modules.s2v.audio_utils import CausalConv1d

__all__ = ["FACE", "FaceAdapter", "FaceBlock", "FaceEncoder"]

FACE = "animate.face"
"""Name in `BlockInputs.features` of the face's tokens, [B, T, S, D]."""

EPS = 1e-6


class FaceEncoder(nn.Module):
    """Motions become, four at a time, `num_heads` tokens of a latent frame, and a learned one. Computes in float32."""

    def __init__(self, in_dim: int, hidden_dim: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.conv1_local = CausalConv1d(in_dim, hidden_dim * num_heads)
        self.conv2 = CausalConv1d(hidden_dim, hidden_dim, stride=2)
        self.conv3 = CausalConv1d(hidden_dim, hidden_dim, stride=2)
        self.out_proj = nn.Linear(hidden_dim, out_dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, out_dim))

    def forward(self, motions: Tensor) -> Tensor:
        """float32 [B, K, in_dim] -> [B, T, S, D], T = K / 4 rounded up."""
        x = self.conv1_local(motions).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1)
        for conv in (self.conv2, self.conv3):
            x = conv(_active(x))
        tokens = linear32(self.out_proj, _active(x)).unflatten(0, (len(motions), -1)).transpose(1, 2)
        return torch.cat((tokens, self.padding_tokens.float().expand(*tokens.shape[:2], 1, -1)), 2)


def _active(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=EPS))


class FaceBlock(nn.Module):
    """Attention of the tokens of a latent frame to that frame's face."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = WanLayerNorm(dim, EPS)
        self.linear1_kv = nn.Linear(dim, 2 * dim)
        self.linear1_q = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.q_norm = WanRMSNorm(dim // num_heads, EPS)
        self.k_norm = WanRMSNorm(dim // num_heads, EPS)

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """What to add to float32 tokens [B, L, D]; nothing to those of no frame."""
        dtype = inputs.context.dtype
        q = self.q_norm(self.linear1_q(self.norm(tokens).to(dtype)).unflatten(-1, (self.num_heads, -1)))
        face = self.linear1_kv(self.norm(inputs.features[FACE]).to(dtype))
        k, v = face.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        out = attend_own_frame(q.to(v.dtype), self.k_norm(k).to(v.dtype), v, inputs.frames)
        added: Tensor = self.linear2(out.flatten(2))
        return added * (inputs.frames >= 0)[:, None]


class FaceAdapter(nn.Module):
    """The face blocks, under upstream's names."""

    def __init__(self, dim: int, num_heads: int, count: int) -> None:
        super().__init__()
        self.fuser_blocks = nn.ModuleList(FaceBlock(dim, num_heads) for _ in range(count))
