"""The demo's VAE as it is trained: Wan 2.1's architecture at a small width.

The forward pass here is a second statement of `wan.modules.vae`, written for throughput: it takes a whole clip at once
where the shipped class walks through it in causal chunks (the two agree, see `tests/wan/test_train_demo.py`) and works
in bfloat16 with channels last. Parameters carry upstream's names from the first step, so the state dict that training
ends with is the checkpoint.
"""

from __future__ import annotations

import math
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
        levels.append(
            Level(blocks=blocks, resampler=None if last else index + res_blocks, temporal=not last and TEMPORAL[depth])
        )
        index += res_blocks + 1
    return levels


def decoder_levels(res_blocks: int) -> list[Level]:
    levels, index = [], 0
    temporal = TEMPORAL[::-1]
    for depth in range(len(MULTIPLIERS)):
        blocks = tuple(range(index, index + res_blocks + 1))
        last = depth == len(MULTIPLIERS) - 1
        levels.append(
            Level(blocks=blocks, resampler=None if last else blocks[-1] + 1, temporal=not last and temporal[depth])
        )
        index += res_blocks + 2
    return levels


# ---------------------------------------------------------------- parameters


class _Fresh:
    """Random weights under upstream's names, drawn part by part.

    The main path keeps the variance of what flows through it and the residual branches start small. With torch's
    default the un-normalised main path shrinks by 0.58 per convolution while the branches keep their size, and colour
    never finds its way through.
    """

    def __init__(self, seed: int) -> None:
        self.params: Params = {}
        self._generator = torch.Generator().manual_seed(seed)

    def conv(self, name: str, out: int, inner: int, kernel: tuple[int, ...], gain: float = 1.0) -> None:
        weight = torch.randn(out, inner, *kernel, generator=self._generator)
        self.params[f"{name}.weight"] = weight * gain / math.sqrt(inner * math.prod(kernel))
        self.params[f"{name}.bias"] = torch.zeros(out)

    def gamma(self, name: str, width: int, dims: int = 3) -> None:
        self.params[f"{name}.gamma"] = torch.ones(width, *[1] * dims)

    def block(self, name: str, inner: int, out: int) -> None:
        self.gamma(f"{name}.residual.0", inner)
        self.conv(f"{name}.residual.2", out, inner, (3, 3, 3), 1.4)
        self.gamma(f"{name}.residual.3", out)
        self.conv(f"{name}.residual.6", out, out, (3, 3, 3), 0.25 * 1.4)
        if inner != out:
            self.conv(f"{name}.shortcut", out, inner, (1, 1, 1))

    def middle(self, name: str, width: int) -> None:
        self.block(f"{name}.0", width, width)
        self.gamma(f"{name}.1.norm", width, 2)
        self.conv(f"{name}.1.to_qkv", 3 * width, width, (1, 1))
        self.conv(f"{name}.1.proj", width, width, (1, 1), 0.25)
        self.block(f"{name}.2", width, width)

    def identity_in_time(self, name: str, width: int, copies: int) -> None:
        weight = torch.randn(copies * width, width, 3, 1, 1, generator=self._generator) * 0.02
        weight[:, :, 2, 0, 0] += torch.eye(width).repeat(copies, 1)
        self.params[f"{name}.weight"], self.params[f"{name}.bias"] = weight, torch.zeros(copies * width)

    def encoder(self, widths: list[int], res_blocks: int) -> None:
        inner = widths[0]
        self.conv("encoder.conv1", inner, 3, (3, 3, 3))
        for width, level in zip(widths, encoder_levels(res_blocks), strict=True):
            for index in level.blocks:
                self.block(f"encoder.downsamples.{index}", inner, width)
                inner = width
            if level.resampler is not None:
                self.conv(f"encoder.downsamples.{level.resampler}.resample.1", width, width, (3, 3))
            if level.temporal:
                self.identity_in_time(f"encoder.downsamples.{level.resampler}.time_conv", width, 1)
        self.middle("encoder.middle", inner)
        self.gamma("encoder.head.0", inner)
        self.conv("encoder.head.2", 2 * Z, inner, (3, 3, 3))

    def latents(self) -> None:
        self.conv("conv1", 2 * Z, 2 * Z, (1, 1, 1))
        self.params["conv1.weight"][Z:] *= 0.1
        self.params["conv1.bias"][Z:] = -6.0  # nearly noise-free at the start
        self.conv("conv2", Z, Z, (1, 1, 1))

    def decoder(self, widths: list[int], res_blocks: int) -> None:
        inner = widths[-1]
        self.conv("decoder.conv1", inner, Z, (3, 3, 3))
        self.middle("decoder.middle", inner)
        for width, level in zip(reversed(widths), decoder_levels(res_blocks), strict=True):
            for index in level.blocks:
                self.block(f"decoder.upsamples.{index}", inner, width)
                inner = width
            if level.temporal:
                self.identity_in_time(f"decoder.upsamples.{level.resampler}.time_conv", width, 2)
            if level.resampler is not None:
                self.conv(f"decoder.upsamples.{level.resampler}.resample.1", width // 2, width, (3, 3))
                inner = width // 2
        self.gamma("decoder.head.0", inner)
        self.conv("decoder.head.2", 3, inner, (3, 3, 3), 0.5)


def init_params(base: int, res_blocks: int, seed: int) -> Params:
    """Random weights for a VAE of width `base`, see `_Fresh`."""
    fresh, widths = _Fresh(seed), [base * m for m in MULTIPLIERS]
    fresh.encoder(widths, res_blocks)
    fresh.latents()
    fresh.decoder(widths, res_blocks)
    return fresh.params


def res_blocks_of(params: Params) -> int:
    """Reads the depth of a level from the names: the first resampler follows the first level's blocks."""
    return min(
        int(name.split(".")[2]) for name in params if name.startswith("encoder.downsamples.") and ".resample." in name
    )


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
    """Rescales the 1x1 convolutions beside the latents, which get mean 0 and deviation 1 with Wan's constants."""
    weights = compute_copy(params)
    latents = torch.cat(
        [encode(weights, video.bfloat16())[0].float().movedim(1, 0).flatten(1) for video in videos], 1
    ).double()
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
