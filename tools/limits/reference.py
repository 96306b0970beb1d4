"""What the original code computes in a forward of Wan 2.2, operation by operation, on the weights of our DiT.

Its sequence, not its text: modulation of every token in float32 [L, 6, D], a time embedding for every token, norms that
multiply and add one after the other, a norm of queries in eager steps, rotary embedding in complex float64, casts
before every product. A rival to time our forward against, and an oracle that it has to agree with.

Source: `wan/modules/model.py` of Wan 2.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.ops.attention import Attend


def velocity(dit: Any, latents: Tensor, timestep: Tensor, context: Tensor, attend: Attend) -> Tensor:
    """The velocity [B, C, T, H, W], float32, of latents at one timestep [B] with a text [B, S, text_dim]."""
    dtype = dit.patch_embedding.weight.dtype
    x = dit.patch_embedding(latents.to(dtype))
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2).float()
    e = time_embedding(dit, timestep[:, None].expand(-1, x.shape[1]))
    e0 = layer32(dit.time_projection[1], F.silu(e)).unflatten(2, (6, dit.dim))
    padded = torch.cat([context, context.new_zeros(len(context), dit.text_len - context.shape[1], dit.text_dim)], 1)
    text = dit.text_embedding(padded.to(dtype))
    turns = rotations(grid, dit.dim // dit.num_heads, x.device)
    for block in dit.blocks:
        x = block_forward(block, x, e0, text, turns, attend)
    shift, scale = (dit.head.modulation.float().unsqueeze(0) + e.unsqueeze(2)).chunk(2, dim=2)
    y = norm(dit.head.norm, x) * (1 + scale.squeeze(2)) + shift.squeeze(2)
    y = layer32(dit.head.head, y)
    y = y.view(len(x), *grid, *dit.patch_size, dit.out_dim)
    y = torch.einsum("bfhwpqrc->bcfphqwr", y)
    return y.reshape(len(x), dit.out_dim, *(n * p for n, p in zip(grid, dit.patch_size, strict=True)))


def time_embedding(dit: Any, timesteps: Tensor) -> Tensor:
    """[B, L, D] float32: the same sinusoids and layers for every token."""
    half = dit.freq_dim // 2
    rates = torch.pow(10000, -torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * rates
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    first, activation, last = dit.time_embedding
    return layer32(last, activation(layer32(first, waves)))


def layer32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer that autocast leaves in float32."""
    return F.linear(x, layer.weight.float(), layer.bias.float())


def norm(layer: Any, x: Tensor) -> Tensor:
    """Layer norm in float32."""
    return layer(x.float())


def rotations(grid: torch.Size, head_dim: int, device: torch.device) -> Tensor:
    """[L, 1, head_dim / 2] complex128, built anew in every call."""
    side = 2 * (head_dim // 6)
    axes = []
    for axis, (length, channels) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        rates = 1.0 / torch.pow(10000, torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), rates)
        view = [1, 1, 1, channels // 2]
        view[axis] = length
        axes.append(torch.polar(torch.ones_like(angles), angles).view(view).expand(*grid, channels // 2))
    return torch.cat(axes, dim=-1).reshape(math.prod(grid), 1, -1)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Heads [B, L, N, D] turned as pairs of complex float64, a sample at a time."""
    samples = [
        torch.view_as_real(torch.view_as_complex(sample.double().unflatten(-1, (-1, 2))) * turns).flatten(2)
        for sample in x
    ]
    return torch.stack(samples).float()


def rms(layer: Any, x: Tensor) -> Tensor:
    """The norm of queries and keys: eight kernels."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + layer.eps)).type_as(x) * layer.weight


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer under autocast: its input is cast for it alone."""
    return layer(x.to(layer.weight.dtype))


def attention(layer: Any, x: Tensor, source: Tensor, turns: Tensor | None, attend: Attend) -> Tensor:
    """Self-attention with rotary embedding, or attention to the text without."""
    q, k, v = rms(layer.norm_q, linear(layer.q, x)), rms(layer.norm_k, linear(layer.k, source)), linear(layer.v, source)
    q, k, v = (each.unflatten(-1, (layer.num_heads, -1)) for each in (q, k, v))
    if turns is not None:
        q, k = turned(q, turns), turned(k, turns)
    # Sequences of a batch are laid end to end for a kernel of sequences of any length.
    k, v = (torch.cat(list(each)).unflatten(0, (len(each), -1)) for each in (k, v))
    half = layer.q.weight.dtype
    out = attend(q.to(half), k.to(half), v.to(half))
    return linear(layer.o, out.type_as(x).flatten(2))


def block_forward(block: Any, x: Tensor, e0: Tensor, text: Tensor, turns: Tensor, attend: Attend) -> Tensor:
    """One block; every token has its own modulation [B, L, 6, D]."""
    e = [part.squeeze(2) for part in (block.modulation.float().unsqueeze(0) + e0).chunk(6, dim=2)]
    y = norm(block.norm1, x) * (1 + e[1]) + e[0]
    x = x + attention(block.self_attn, y, y, turns, attend).float() * e[2]
    x = x + attention(block.cross_attn, norm(block.norm3, x), text, None, attend)
    y = norm(block.norm2, x) * (1 + e[4]) + e[3]
    first, _, last = block.ffn
    y = linear(last, F.gelu(linear(first, y), approximate="tanh"))
    return x + y.float() * e[5]
