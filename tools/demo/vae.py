"""The demo's VAE as it is trained: Wan 2.1's architecture at a small width.

The forward pass here is a second statement of `wan.modules.vae`, written for throughput: it takes a whole clip at once
where the shipped class walks through it in causal chunks (the two agree, see `tests/wan/test_train_demo.py`), works in
bfloat16 with channels last, and is compiled. Parameters carry upstream's names from the first step, so the state dict that
training ends with is the checkpoint.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm_silu import PAD_FRAMES, norm_silu_pad

Params = dict[str, Tensor]
MULTIPLIERS = (1, 2, 4, 4)
TEMPORAL = (False, True, True)
Z = 16


@dataclass(frozen=True, kw_only=True)
class Level:
    """One stage of the encoder or the decoder: indices of its blocks, then the resampler's (None at the end)."""

    blocks: tuple[int, ...]
    resampler: int | None
    temporal: bool


def encoder_levels(res_blocks: int) -> list[Level]:
    levels, index = [], 0
    for depth in range(len(MULTIPLIERS)):
        blocks = tuple(range(index, index + res_blocks))
        last = depth == len(MULTIPLIERS) - 1
        levels.append(Level(blocks=blocks, resampler=None if last else index + res_blocks, temporal=not last and TEMPORAL[depth]))
        index += res_blocks + 1
    return levels


def decoder_levels(res_blocks: int) -> list[Level]:
    levels, index = [], 0
    temporal = TEMPORAL[::-1]
    for depth in range(len(MULTIPLIERS)):
        blocks = tuple(range(index, index + res_blocks + 1))
        last = depth == len(MULTIPLIERS) - 1
        levels.append(Level(blocks=blocks, resampler=None if last else blocks[-1] + 1, temporal=not last and temporal[depth]))
        index += res_blocks + 2
    return levels


# ---------------------------------------------------------------- parameters


def init_params(base: int, res_blocks: int, seed: int) -> Params:
    """Random weights under upstream's names.

    The main path keeps the variance of what flows through it and the residual branches start small. With torch's default
    the un-normalised main path shrinks by 0.58 per convolution while the branches keep their size, and colour never
    finds its way through.
    """
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}

    def conv(name: str, out: int, inner: int, kernel: tuple[int, ...], gain: float = 1.0) -> None:
        fan_in = inner * math.prod(kernel)
        params[f"{name}.weight"] = torch.randn(out, inner, *kernel, generator=generator) * gain / math.sqrt(fan_in)
        params[f"{name}.bias"] = torch.zeros(out)

    def block(name: str, inner: int, out: int) -> None:
        params[f"{name}.residual.0.gamma"] = torch.ones(inner, 1, 1, 1)
        conv(f"{name}.residual.2", out, inner, (3, 3, 3), 1.4)
        params[f"{name}.residual.3.gamma"] = torch.ones(out, 1, 1, 1)
        conv(f"{name}.residual.6", out, out, (3, 3, 3), 0.25 * 1.4)
        if inner != out:
            conv(f"{name}.shortcut", out, inner, (1, 1, 1))

    def middle(name: str, width: int) -> None:
        block(f"{name}.0", width, width)
        params[f"{name}.1.norm.gamma"] = torch.ones(width, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * width, width, (1, 1))
        conv(f"{name}.1.proj", width, width, (1, 1), 0.25)
        block(f"{name}.2", width, width)

    def identity_in_time(name: str, width: int, copies: int) -> None:
        weight = torch.randn(copies * width, width, 3, 1, 1, generator=generator) * 0.02
        for copy in range(copies):
            weight[copy * width : (copy + 1) * width, :, 2, 0, 0] += torch.eye(width)
        params[f"{name}.weight"], params[f"{name}.bias"] = weight, torch.zeros(copies * width)

    widths = [base * m for m in MULTIPLIERS]
    conv("encoder.conv1", base, 3, (3, 3, 3))
    inner = base
    for width, level in zip(widths, encoder_levels(res_blocks), strict=True):
        for index in level.blocks:
            block(f"encoder.downsamples.{index}", inner, width)
            inner = width
        if level.resampler is not None:
            conv(f"encoder.downsamples.{level.resampler}.resample.1", width, width, (3, 3))
            if level.temporal:
                identity_in_time(f"encoder.downsamples.{level.resampler}.time_conv", width, 1)
    middle("encoder.middle", inner)
    params["encoder.head.0.gamma"] = torch.ones(inner, 1, 1, 1)
    conv("encoder.head.2", 2 * Z, inner, (3, 3, 3))
    conv("conv1", 2 * Z, 2 * Z, (1, 1, 1))
    params["conv1.weight"][Z:] *= 0.1
    params["conv1.bias"][Z:] = -6.0  # nearly noise-free at the start
    conv("conv2", Z, Z, (1, 1, 1))
    conv("decoder.conv1", widths[-1], Z, (3, 3, 3))
    middle("decoder.middle", widths[-1])
    inner = widths[-1]
    for depth, level in enumerate(decoder_levels(res_blocks)):
        width = widths[len(widths) - 1 - depth]
        for index in level.blocks:
            block(f"decoder.upsamples.{index}", inner, width)
            inner = width
        if level.resampler is not None:
            if level.temporal:
                identity_in_time(f"decoder.upsamples.{level.resampler}.time_conv", width, 2)
            conv(f"decoder.upsamples.{level.resampler}.resample.1", width // 2, width, (3, 3))
            inner = width // 2
    params["decoder.head.0.gamma"] = torch.ones(inner, 1, 1, 1)
    conv("decoder.head.2", 3, inner, (3, 3, 3), 0.5)
    return params


def res_blocks_of(params: Params) -> int:
    """Reads the depth of a level from the names: the first resampler follows the first level's blocks."""
    return min(int(name.split(".")[2]) for name in params if name.startswith("encoder.downsamples.") and ".resample." in name)


# ---------------------------------------------------------------- forward


def _causal_conv(p: Params, name: str, x: Tensor) -> Tensor:
    """The causal 3x3x3 convolution over a whole clip that already has its two leading zero frames."""
    return F.conv3d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=(0, 1, 1))


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, PAD_FRAMES, 0))


def _block(p: Params, name: str, x: Tensor) -> Tensor:
    h = _causal_conv(p, f"{name}.residual.2", norm_silu_pad(x, p[f"{name}.residual.0.gamma"]))
    h = _causal_conv(p, f"{name}.residual.6", norm_silu_pad(h, p[f"{name}.residual.3.gamma"]))
    if f"{name}.shortcut.weight" in p:
        x = F.conv3d(x, p[f"{name}.shortcut.weight"], p[f"{name}.shortcut.bias"])
    return x + h


def _frame_conv(p: Params, name: str, x: Tensor, stride: int) -> Tensor:
    x = F.pad(x, (0, 1, 0, 1)) if stride == 2 else F.pad(x, (1, 1, 1, 1))
    return F.conv3d(x, p[f"{name}.weight"].unsqueeze(2), p[f"{name}.bias"], stride=(1, stride, stride))


def _attention(p: Params, name: str, x: Tensor) -> Tensor:
    batch, width, frames, height, breadth = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).reshape(batch * frames, height * breadth, width)
    t32 = tokens.float()
    normed = t32 * torch.rsqrt(t32.square().mean(-1, keepdim=True) + 1e-12) * p[f"{name}.norm.gamma"].float().view(-1)
    q, k, v = F.linear(normed.to(x.dtype), p[f"{name}.to_qkv.weight"].flatten(1), p[f"{name}.to_qkv.bias"]).chunk(3, -1)
    weights = torch.softmax((q @ k.transpose(1, 2)).float() / math.sqrt(width), -1).to(x.dtype)
    out = F.linear(weights @ v, p[f"{name}.proj.weight"].flatten(1), p[f"{name}.proj.bias"])
    return x + out.view(batch, frames, height, breadth, width).permute(0, 4, 1, 2, 3)


def _middle(p: Params, name: str, x: Tensor) -> Tensor:
    x = _block(p, f"{name}.0", x)
    x = _attention(p, f"{name}.1", x)
    return _block(p, f"{name}.2", x)


def encode(p: Params, video: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, 4n + 1, H, W] -> mean and log-variance, each [B, 16, n + 1, H / 8, W / 8]."""
    x = _causal_conv(p, "encoder.conv1", _padded(video))
    for level in encoder_levels(res_blocks_of(p)):
        for index in level.blocks:
            x = _block(p, f"encoder.downsamples.{index}", x)
        if level.resampler is not None:
            name = f"encoder.downsamples.{level.resampler}"
            x = _frame_conv(p, f"{name}.resample.1", x, 2)
            if level.temporal and x.shape[2] > 1:
                later = F.conv3d(x, p[f"{name}.time_conv.weight"], p[f"{name}.time_conv.bias"], stride=(2, 1, 1))
                x = torch.cat([x[:, :, :1], later], 2)
    x = _middle(p, "encoder.middle", x)
    x = _causal_conv(p, "encoder.head.2", norm_silu_pad(x, p["encoder.head.0.gamma"]))
    mean, logvar = F.conv3d(x, p["conv1.weight"], p["conv1.bias"]).chunk(2, 1)
    return mean, logvar


def decode(p: Params, z: Tensor) -> Tensor:
    """[B, 16, t, h, w] -> video [B, 3, 4 (t - 1) + 1, 8 h, 8 w], not clamped."""
    x = F.conv3d(z, p["conv2.weight"], p["conv2.bias"])
    x = _middle(p, "decoder.middle", _causal_conv(p, "decoder.conv1", _padded(x)))
    for level in decoder_levels(res_blocks_of(p)):
        for index in level.blocks:
            x = _block(p, f"decoder.upsamples.{index}", x)
        if level.resampler is not None:
            name = f"decoder.upsamples.{level.resampler}"
            if level.temporal and x.shape[2] > 1:
                x = torch.cat([x[:, :, :1], _double_time(p, f"{name}.time_conv", x[:, :, 1:])], 2)
            x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
            x = _frame_conv(p, f"{name}.resample.1", x, 1)
    return _causal_conv(p, "decoder.head.2", norm_silu_pad(x, p["decoder.head.0.gamma"]))


def _double_time(p: Params, name: str, x: Tensor) -> Tensor:
    batch, width, frames, height, breadth = x.shape
    both = F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), p[f"{name}.weight"], p[f"{name}.bias"])
    both = both.view(batch, 2, width, frames, height, breadth)
    return both.permute(0, 2, 3, 1, 4, 5).reshape(batch, width, 2 * frames, height, breadth)


def compute_copy(params: Params, dtype: torch.dtype = torch.bfloat16) -> Params:
    """Casts and lays out the weights for the convolutions; gradients flow back to the float32 originals."""
    return {
        name: value.to(dtype, memory_format=torch.channels_last_3d) if value.ndim == 5 else value.to(dtype)
        for name, value in params.items()
    }


# ---------------------------------------------------------------- training


# Wan 2.1's constants, hard-coded in every program that reads its VAE.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@torch.no_grad()
def fold_normalization(params: Params, videos: list[Tensor]) -> Params:
    """Rescales the 1x1 convolutions on either side of the latents so that they have mean 0 and deviation 1 with Wan's constants."""
    weights = compute_copy(params)
    latents = torch.cat([encode(weights, video.bfloat16())[0].float().movedim(1, 0).flatten(1) for video in videos], 1).double()
    mean, std = latents.mean(1), latents.std(1)
    wanted_mean, wanted_std = torch.tensor(LATENT_MEAN).double(), torch.tensor(LATENT_STD).double()
    gain = wanted_std / std
    folded = {name: value.detach().double() for name, value in params.items()}
    folded["conv1.weight"][:Z] *= gain.view(-1, 1, 1, 1, 1)
    folded["conv1.bias"][:Z] = (folded["conv1.bias"][:Z] - mean) * gain + wanted_mean
    matrix = folded["conv2.weight"].flatten(1)
    folded["conv2.bias"] = folded["conv2.bias"] + matrix @ (mean - wanted_mean / gain)
    folded["conv2.weight"] = (matrix / gain).view_as(folded["conv2.weight"])
    return {name: value.float() for name, value in folded.items()}


@torch.no_grad()
def normalized_latents(weights: Params, videos: Tensor) -> Tensor:
    """Videos [B, 3, T, H, W] -> latents as the DiT sees them, float32. `weights` come from `compute_copy`."""
    x = videos.to(weights["conv1.weight"].dtype).contiguous(memory_format=torch.channels_last_3d)
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (LATENT_MEAN, LATENT_STD))
    return (encode(weights, x)[0].float() - mean) / std


@torch.no_grad()
def decoded(weights: Params, latents: Tensor) -> Tensor:
    """The inverse of `normalized_latents`, clamped to [-1, 1]."""
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (LATENT_MEAN, LATENT_STD))
    z = (latents * std + mean).to(weights["conv1.weight"].dtype)
    return decode(weights, z.contiguous(memory_format=torch.channels_last_3d)).float().clamp(-1, 1)
