"""The expression of a face as a point in a learned space of motions: a convolutional encoder per frame.

It is the encoder of the Latent Image Animator (Wang et al. 2022, arXiv:2203.09043) with the equalised layers of
StyleGAN 2 (arXiv:1912.04958); parameter names are upstream's. It runs once for a video and computes in float32 whatever
dtype its weights are stored in.

Letters: F faces, C channels, H/W height/width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest

__all__ = ["FACES_AT_A_TIME", "Generator"]

FACES_AT_A_TIME = 8
BLUR = (1.0, 3.0, 3.0, 1.0)
LAST_SIZE = 4
"""Side of the picture that is left for the last convolution."""


class EqualConv2d(nn.Module):
    """Convolution whose weights are scaled by 1 / sqrt(fan-in) when they are used."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() / math.sqrt(self.weight[0].numel())
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """Linear layer whose weights are scaled by 1 / sqrt(fan-in) when they are used."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() / math.sqrt(self.weight.shape[1]), self.bias.float())


class FusedLeakyReLU(nn.Module):
    """Adds a bias, then a leaky ReLU that keeps the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias.float(), 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Low-pass filter before every second pixel is dropped. The checkpoint decides its values."""

    kernel: Tensor

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        line = torch.tensor(BLUR)
        self.register_buffer("kernel", line[:, None] * line / line.sum() ** 2)
        self.padding = (len(BLUR) + kernel_size - 2) // 2  # such that the next convolution halves the picture

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.float().flip(0, 1).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, padding=self.padding, groups=x.shape[1])


class ResBlock(nn.Module):
    """Halves the picture."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv2d(in_channels, in_channels, 3, padding=1), FusedLeakyReLU(in_channels))
        self.conv2 = nn.Sequential(Blur(3), EqualConv2d(in_channels, out_channels, 3, 2), FusedLeakyReLU(out_channels))
        self.skip = nn.Sequential(Blur(1), EqualConv2d(in_channels, out_channels, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x)) + self.skip(x)
        return out / math.sqrt(2)


class Appearance(nn.Module):
    """Convolutions down to a single pixel."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(EqualConv2d(3, widths[0], 1), FusedLeakyReLU(widths[0]))])
        self.convs.extend(ResBlock(before, after) for before, after in pairwise(widths))
        self.convs.append(EqualConv2d(widths[-1], widths[-1], LAST_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return x.flatten(1)


class Encoder(nn.Module):
    """Picture -> coefficients of motion."""

    def __init__(self, widths: Sequence[int], motion_dim: int) -> None:
        super().__init__()
        self.net_app = Appearance(widths)
        sizes = [widths[-1]] * 5 + [motion_dim]
        self.fc = nn.Sequential(*(EqualLinear(before, after) for before, after in pairwise(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        coefficients: Tensor = self.fc(self.net_app(x))
        return coefficients


class Direction(nn.Module):
    """Coefficients -> their sum along directions that are made orthogonal."""

    def __init__(self, out_dim: int, motion_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, motion_dim))

    def forward(self, coefficients: Tensor) -> Tensor:
        directions, _ = torch.linalg.qr(self.weight.float() + 1e-8)
        return coefficients @ directions.T


class Synthesis(nn.Module):
    """What upstream keeps of the animator's decoder."""

    def __init__(self, out_dim: int, motion_dim: int) -> None:
        super().__init__()
        self.direction = Direction(out_dim, motion_dim)


class Generator(nn.Module):
    """Faces [F, 3, H, W] in -1..1 to motions, float32 [F, out_dim]. `widths` are the channels at each size."""

    def __init__(self, widths: Sequence[int], motion_dim: int, out_dim: int) -> None:
        super().__init__()
        self.size = LAST_SIZE * 2 ** (len(widths) - 1)
        self.enc = Encoder(widths, motion_dim)
        self.dec = Synthesis(out_dim, motion_dim)

    def forward(self, faces: Tensor) -> Tensor:
        if tuple(faces.shape[-2:]) != (self.size, self.size):
            raise BadRequest(
                f"faces of {faces.shape[-1]}x{faces.shape[-2]} pixels: this model takes {self.size}x{self.size}"
            )
        coefficients = [self.enc(few.float()) for few in faces.split(FACES_AT_A_TIME)]
        motions: Tensor = self.dec.direction(torch.cat(coefficients))
        return motions
