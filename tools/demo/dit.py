"""The DiT as it is trained: a second statement of `wan.modules.model.WanModel`'s forward pass, written for throughput.

Parameters carry upstream's names. Weights and activations are bfloat16 copies of float32 masters, the residual
stream included, and one compiled function serves every block. `tests/wan/test_train_demo.py` holds it to `WanModel`
in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """Upstream's config.json fields, and the text width, which upstream reads from no config file."""

    dim: int = 256
    ffn_dim: int = 768
    num_heads: int = 2
    num_layers: int = 5
    freq_dim: int = 128
    in_dim: int = 16
    out_dim: int = 16
    text_len: int = 32
    text_dim: int = 128
    eps: float = 1e-6

    def to_json(self) -> dict[str, object]:
        fields = {name: value for name, value in asdict(self).items() if name != "text_dim"}
        kind = "t2v" if self.in_dim == self.out_dim else "i2v"
        return {"_class_name": "WanModel", "_diffusers_version": "0.33.0", "model_type": kind, **fields}


BLOCK_KEYS = (
    "modulation", "norm3.weight", "norm3.bias",
    *(f"{part}_attn.{name}.{kind}" for part in ("self", "cross") for name in "qkvo" for kind in ("weight", "bias")),
    *(f"{part}_attn.norm_{name}.weight" for part in ("self", "cross") for name in "qk"),
    "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
)  # fmt: skip


def init_params(config: DitConfig, seed: int) -> Params:
    """Xavier matrices, zero output head, gates open by a half so that every block takes part from the first step."""
    generator = torch.Generator().manual_seed(seed)
    dim, params = config.dim, {}

    def linear(name: str, out: int, inner: int, std: float | None = None) -> None:
        std = math.sqrt(2 / (out + inner)) if std is None else std
        params[f"{name}.weight"] = torch.randn(out, inner, generator=generator) * std
        params[f"{name}.bias"] = torch.zeros(out)

    linear("patch_embedding", dim, config.in_dim * 4)
    params["patch_embedding.weight"] = params["patch_embedding.weight"].view(dim, config.in_dim, 1, 2, 2)
    linear("text_embedding.0", dim, config.text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, config.freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim, 0.02)
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        params[f"{block}.modulation"] = torch.randn(1, 6, dim, generator=generator) / dim**0.5
        params[f"{block}.modulation"][:, (2, 5)] += 0.5
        params[f"{block}.norm3.weight"], params[f"{block}.norm3.bias"] = torch.ones(dim), torch.zeros(dim)
        for part in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{part}.{name}", dim, dim)
            params[f"{block}.{part}.norm_q.weight"] = torch.ones(dim)
            params[f"{block}.{part}.norm_k.weight"] = torch.ones(dim)
        linear(f"{block}.ffn.0", config.ffn_dim, dim)
        linear(f"{block}.ffn.2", dim, config.ffn_dim)
    params["head.modulation"] = torch.randn(1, 2, dim, generator=generator) / dim**0.5
    linear("head.head", 4 * config.out_dim, dim, 0.0)
    return params


@functools.cache
def rope_table(frames: int, height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, head_dim / 2] of every token: bands for time, row and column."""
    pairs = head_dim // 2
    bands = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, height, width)), indexing="ij")
    angles = [
        position.reshape(-1, 1) * 10000.0 ** -(torch.arange(band, dtype=torch.float64) / band)
        for position, band in zip(grid, bands, strict=True)
    ]
    together = torch.cat(angles, 1)
    return together.cos().float(), together.sin().float()


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * scale.float() + shift.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs of [B, L, N, 128]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, L, N, D] written out: at these lengths its backward pass on a CPU takes half of SDPA's time."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2)


def block_forward(
    x: Tensor, time: Tensor, context: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor], heads: int, eps: float
) -> Tensor:
    """One block: x [B, L, D], time [B, 6, D] float32, context [B, S, D]."""
    p = dict(zip(BLOCK_KEYS, weights, strict=True))
    batch, length, dim = x.shape
    m = (p["modulation"].float() + time).unsqueeze(2).unbind(1)  # six of [B, 1, D]

    a = _layer_norm(x, 1 + m[1], m[0], eps)
    qkv = [F.linear(a, p[f"self_attn.{n}.weight"], p[f"self_attn.{n}.bias"]) for n in "qkv"]
    q = _rotate(_rms(qkv[0], p["self_attn.norm_q.weight"], eps).view(batch, length, heads, -1), cos, sin)
    k = _rotate(_rms(qkv[1], p["self_attn.norm_k.weight"], eps).view(batch, length, heads, -1), cos, sin)
    v = qkv[2].view(batch, length, heads, -1)
    seen = _attention(q, k, v).reshape(x.shape)
    seen = F.linear(seen, p["self_attn.o.weight"], p["self_attn.o.bias"])
    x = (x.float() + m[2] * seen.float()).to(x.dtype)

    a = _layer_norm(x, p["norm3.weight"], p["norm3.bias"], eps)
    q = _rms(F.linear(a, p["cross_attn.q.weight"], p["cross_attn.q.bias"]), p["cross_attn.norm_q.weight"], eps)
    k = _rms(F.linear(context, p["cross_attn.k.weight"], p["cross_attn.k.bias"]), p["cross_attn.norm_k.weight"], eps)
    v = F.linear(context, p["cross_attn.v.weight"], p["cross_attn.v.bias"])
    q, k, v = (t.view(batch, -1, heads, dim // heads) for t in (q, k, v))
    read = _attention(q, k, v).reshape(x.shape)
    x = x + F.linear(read, p["cross_attn.o.weight"], p["cross_attn.o.bias"])

    a = _layer_norm(x, 1 + m[4], m[3], eps)
    hidden = F.gelu(F.linear(a, p["ffn.0.weight"], p["ffn.0.bias"]), approximate="tanh")
    out = F.linear(hidden, p["ffn.2.weight"], p["ffn.2.bias"])
    return (x.float() + m[5] * out.float()).to(x.dtype)


def velocity(
    p: Params,
    config: DitConfig,
    latents: Tensor,
    sigma: Tensor,
    context: Tensor,
    block: Callable[..., Tensor] = block_forward,
) -> Tensor:
    """latents [B, in_dim, T, H, W], sigma [B] in 0..1, context [B, text_len, text_dim] -> velocity of the first
    out_dim channels, float32.

    Block weights are used in their own dtype; time and head are float32, as in the shipped class.
    """
    dtype = p["blocks.0.ffn.0.weight"].dtype
    batch, channels, frames, height, width = latents.shape
    grid = (frames, height // 2, width // 2)
    tokens = latents.unflatten(4, (grid[2], 2)).unflatten(3, (grid[1], 2))  # [B, C, T, h, 2, w, 2]
    tokens = tokens.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, math.prod(grid), channels * 4).to(dtype)
    x = F.linear(tokens, p["patch_embedding.weight"].flatten(1), p["patch_embedding.bias"])
    half = config.freq_dim // 2
    angles = 1000.0 * sigma[:, None].double() * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    wave = torch.cat([angles.cos(), angles.sin()], 1).float()
    time = _mlp(p, "time_embedding", wave, F.silu)
    modulation = F.linear(F.silu(time), p["time_projection.1.weight"].float(), p["time_projection.1.bias"].float())
    text = _mlp(p, "text_embedding", context.to(dtype), functools.partial(F.gelu, approximate="tanh"))
    cos, sin = rope_table(*grid, config.dim // config.num_heads)
    for index in range(config.num_layers):
        weights = [p[f"blocks.{index}.{key}"] for key in BLOCK_KEYS]
        x = block(x, modulation.view(batch, 6, -1), text, cos, sin, weights, config.num_heads, config.eps)
    shift, scale = (p["head.modulation"].float() + time[:, None]).unsqueeze(2).unbind(1)
    out = _layer_norm(x.float(), 1 + scale, shift, config.eps)
    out = F.linear(out, p["head.head.weight"].float(), p["head.head.bias"].float())
    out = out.view(batch, *grid, 2, 2, config.out_dim).permute(0, 6, 1, 2, 4, 3, 5)
    return out.reshape(batch, config.out_dim, frames, height, width)


def _mlp(p: Params, name: str, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = activation(F.linear(x, p[f"{name}.0.weight"].to(x.dtype), p[f"{name}.0.bias"].to(x.dtype)))
    return F.linear(hidden, p[f"{name}.2.weight"].to(x.dtype), p[f"{name}.2.bias"].to(x.dtype))


def compute_copy(params: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Params:
    return {name: value.to(dtype) for name, value in params.items()}
