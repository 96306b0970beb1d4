"""How far the frames of one run are from those of another that began with the same noise.

A speed-up that changes the picture is told as such: by how much, in the 8-bit levels of the file.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
WINDOW, DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""Constants of Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004)."""


def compare(frames: Tensor, reference: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Figures by name, and why others are missing. Both uint8 [N, H, W, 3].

    `frames_max` and `frames_mean` are differences in levels, `psnr_db` is missing where nothing differs.
    """
    if frames.shape != reference.shape:
        why = f"{tuple(frames.shape)} frames against {tuple(reference.shape)}"
        return {}, dict.fromkeys(("frames_max", "psnr_db", "ssim", "lpips"), why)
    largest = means = squares = likeness = 0.0
    for one, other in zip(frames, reference, strict=True):  # a long video in floating point is gigabytes
        a, b = one.float(), other.float()
        difference = (a - b).abs()
        largest = max(largest, float(difference.max()))
        means += float(difference.mean()) / len(frames)
        squares += float(difference.square().mean(dtype=torch.float64)) / len(frames)
        likeness += ssim(luma(a), luma(b)) / len(frames)
    found = {"frames_max": largest, "frames_mean": means, "ssim": likeness}
    missing = {}
    if squares:
        found["psnr_db"] = 10 * math.log10(255**2 / squares)
    else:
        missing["psnr_db"] = "the frames are equal"
    distance = _lpips(frames, reference)
    if isinstance(distance, str):
        missing["lpips"] = distance
    else:
        found["lpips"] = distance
    return found, missing


def luma(frame: Tensor) -> Tensor:
    """[H, W] of a frame [H, W, 3], values as they come (0..255)."""
    return frame @ torch.tensor(LUMA)


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two pictures [H, W] of 0..255, under a Gaussian window that stays inside."""
    size = min(WINDOW, *a.shape)
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = (-(at**2) / (2 * DEVIATION**2)).exp()
    weights = weights / weights.sum()

    def blurred(image: Tensor) -> Tensor:
        rows = F.conv2d(image[None, None], weights.view(1, 1, -1, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, -1))[0, 0]

    a, b = a.double(), b.double()
    mean_a, mean_b = blurred(a), blurred(b)
    variances = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return float((alike / ((mean_a**2 + mean_b**2 + C1) * (variances + C2))).mean())


def _lpips(frames: Tensor, reference: Tensor) -> float | str:
    """The learned distance, where its package and its network are on this machine; else why not."""
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed"
    backbone = list(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth"))
    if not backbone:
        return "the weights of its network (alexnet) are not in torch's hub folder; nothing is downloaded here"
    import lpips

    model: Any = lpips.LPIPS(net="alex", verbose=False)
    with torch.inference_mode():
        each = [float(model(_signed(a), _signed(b))) for a, b in zip(frames, reference, strict=True)]
    return sum(each) / len(each)


def _signed(frame: Tensor) -> Tensor:
    return (frame.float() / 127.5 - 1).permute(2, 0, 1)[None]


def reads_as(frames: Tensor) -> str:
    """What the demo's judge sees in frames of the demo model's world: "large red circle, right, quick, ..."."""
    from wan.cli.judge import judge

    verdict = judge(frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
    words = (verdict.size, verdict.color, verdict.shape, verdict.motion, verdict.speed, verdict.tone, verdict.texture)
    return " ".join(word for word in words if word is not None)
