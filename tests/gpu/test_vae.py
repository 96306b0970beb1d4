"""On a GPU: the VAE's other ways give what the plain layers give, in less time, at a published decoder's widths."""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from wan.engine.compiling import room_for_forms
from wan.engine.engine import Engine
from wan.engine.optimizations import VAEChannelsLast, VAECompile, VAEMatmulAttention, VAESubpixel
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAE_2_1, VAE_2_2, VAEConfig

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
WAYS = (
    VAEChannelsLast(vae_channels_last=True),
    VAESubpixel(vae_subpixel=True),
    VAEMatmulAttention(vae_matmul_attention=True),
)


def decoded(vae: WanVAEModel, latents: Tensor, frames_per_chunk: int) -> tuple[Tensor, float]:
    """The video, and the seconds of the second of two equal calls."""
    for _ in range(2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        video = vae.decode(latents, frames_per_chunk=frames_per_chunk)
        end.record()
        torch.cuda.synchronize()
    return video.float(), begin.elapsed_time(end) / 1e3


@pytest.mark.parametrize("config", [VAE_2_1, VAE_2_2], ids=["2.1", "2.2"])
@torch.inference_mode()
def test_bfloat16_the_other_way_is_as_near_to_float32_and_faster(config: VAEConfig) -> None:
    with torch.inference_mode(False), CUDA:
        exact = WanVAEModel(config).eval().requires_grad_(False)
    for name, value in exact.named_parameters():
        if not name.endswith("gamma"):
            value.normal_(std=0.6 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.01)
    plain = deepcopy(exact)
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.bfloat16()
    other, compiled = deepcopy(plain), deepcopy(plain)
    for model, ways in ((other, WAYS), (compiled, (*WAYS, VAECompile(vae_compile=True)))):
        for way in ways:
            way.finish(model, "vae", cast("Engine", None))
    latents = torch.randn(1, config.z_dim, 5, 30, 52, device=CUDA)
    reference, _ = decoded(exact, latents, 1)
    (rounded, before), (fast, after) = decoded(plain, latents, 1), decoded(other, latents, 2)
    assert (fast - reference).norm() < 1.3 * (rounded - reference).norm()
    assert after < before
    with room_for_forms(64):
        made, seconds = decoded(compiled, latents, 2)
    assert (made - reference).norm() < 1.3 * (rounded - reference).norm()
    assert seconds < after
