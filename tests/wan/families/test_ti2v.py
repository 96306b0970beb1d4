"""Text- and image-to-video 5B: the picture's latents stay, at timestep 0, and what upstream's class promises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import wan
from wan.conditioning.first_frame import cover, known_first_frame
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.types import Encoders
from wan.modules.vae import WanVAEModel
from wan.utils.utils import best_output_size, masks_like

FLOAT32 = 1e-5  # float32 against float32: only the order of sums differs
SMALL: dict[str, Any] = {"frame_num": 5, "sampling_steps": 3, "seed": 7}


@pytest.fixture
def pipeline(ti2v_checkpoint: Path, small_config: Callable[[str], Any]) -> wan.WanTI2V:
    return wan.WanTI2V(small_config("ti2v-5B"), ti2v_checkpoint, device="cpu")


def picture(width: int = 96, height: int = 64) -> Image.Image:
    pixels = (torch.rand(height, width, 3) * 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_the_config_is_upstreams() -> None:
    config = WAN_CONFIGS["ti2v-5B"]
    assert (config.sample_fps, config.frame_num, config.sample_steps) == (24, 121, 50)
    assert (config.sample_shift, config.sample_guide_scale) == (5.0, 5.0)
    assert (config.vae_stride, config.patch_size, config.vae_checkpoint) == ((4, 16, 16), (1, 2, 2), "Wan2.2_VAE.pth")
    assert (config.dim, config.ffn_dim, config.num_heads, config.num_layers) == (3072, 14336, 24, 30)


def test_a_picture_is_scaled_to_cover_and_cut_at_the_centre() -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (32, 0, 64, 32))
    pixels = cover(wide, 32, 32)
    assert pixels.shape == (3, 1, 32, 32) and (pixels == 1).all()
    exact = picture(32, 64)
    values = torch.frombuffer(bytearray(exact.tobytes()), dtype=torch.uint8).view(64, 32, 3).permute(2, 0, 1)
    assert torch.allclose(cover(exact, 32, 64)[:, 0], values / 127.5 - 1, atol=1e-6)


@torch.inference_mode()
def test_the_pictures_latents_are_known_in_the_first_latent_frame(pipeline: wan.WanTI2V) -> None:
    vae = pipeline.vae.model
    frame = cover(picture(), 96, 64)
    cpu = torch.device("cpu")
    encoders = Encoders(use=lambda name: nullcontext(vae), where=lambda name: cpu, device=cpu, config=None)
    known = known_first_frame(encoders, frame, (48, 2, 4, 6))
    z = vae.encode(frame[None])
    noise = torch.randn(48, 2, 4, 6)
    _, [mask] = masks_like([noise], zero=True)
    # Upstream: latent = (1. - mask2[0]) * z[0] + mask2[0] * latent
    assert torch.equal(known.apply(noise[None], None)[0], (1 - mask) * z[0] + mask * noise)


@torch.inference_mode()
def test_image_to_video_is_upstreams_loop_written_out(pipeline: wan.WanTI2V) -> None:
    """Per-token timesteps with 0 for the first frame, and the clean latents put back after every step."""
    from wan.engine.sampling.schedule import flow_steps
    from wan.engine.sampling.solvers import make_solver

    seen: list[Tensor] = []
    image = picture()
    video = pipeline.i2v("a cat", image, 96 * 64, shift=5.0, guide_scale=3.0, **SMALL,
                         observe=(lambda step, latents: seen.append(latents.clone()),))  # fmt: skip
    assert video is not None and video.shape == (3, 5, 64, 96)
    encoder = pipeline.text_encoder
    contexts = [encoder([text], torch.device("cpu")) for text in ("a cat", "blurry")]
    z = pipeline.vae.encode([cover(image, 96, 64)])[0]
    noise = torch.randn(48, 2, 4, 6, generator=torch.Generator().manual_seed(7))
    _, [mask] = masks_like([noise], zero=True)
    x = (1 - mask) * z + mask * noise
    steps = flow_steps("unipc", 3, 5.0)
    solver = make_solver("unipc", steps)
    for step, expected in zip(steps, seen, strict=True):
        t = (mask[0][:, ::2, ::2] * step.t).flatten()[None]
        cond, uncond = (pipeline.model([x], t=t, context=context, seq_len=12)[0] for context in contexts)
        x = solver.step((uncond + 3.0 * (cond - uncond))[None], step, x[None])[0]
        x = (1 - mask) * z + mask * x
        assert ((x - expected[0]).norm() / x.norm()).item() < FLOAT32
        assert torch.equal(expected[0, :, 0], z[:, 0])
    assert (video - pipeline.vae.decode([x])[0]).abs().max() < 1e-3


def test_the_video_begins_with_the_picture_and_follows_its_shape(pipeline: wan.WanTI2V) -> None:
    for size, area, expected in (((96, 64), 96 * 64, (96, 64)), ((64, 128), 64 * 96, (64, 96))):
        image = picture(*size)
        video = pipeline.generate("a cat", img=image, max_area=area, **SMALL)
        width, height = best_output_size(*size, 32, 32, area)
        assert video is not None and video.shape == (3, 5, height, width) and (width, height) == expected
        one = pipeline.vae.decode(pipeline.vae.encode([cover(image, width, height)]))[0]
        assert (video[:, 0] - one[:, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("fits", ["in tiles of 16 latent pixels", "in tiles of 16 latent pixels on the CPU", ""])
def test_out_of_memory_while_encoding_is_tried_again_as_while_decoding(
    pipeline: wan.WanTI2V, monkeypatch: pytest.MonkeyPatch, fits: str
) -> None:
    """In tiles: the latents are those that tiles give from the start. Nothing fits: it is said, nothing is made up."""
    tried: list[str] = []
    encode = WanVAEModel.encode

    def short(self: WanVAEModel, video: Tensor, *given: Any, **named: Any) -> Tensor:
        tried.append(pipeline.report.encode)
        if tried[-1] != fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, video, *given, **named)

    def latents(**options: Any) -> Tensor:
        seen: list[Tensor] = []
        watch = (lambda step, latents: seen.append(latents.clone()),)
        pipeline.i2v("a cat", image, 288 * 32, shift=5.0, guide_scale=3.0, observe=watch, **SMALL, **options)
        return seen[-1]

    image = picture(288, 32)
    expected = latents(vae_tiling=True, vae_tile_size=16, vae_tile_overlap=4)
    monkeypatch.setattr(WanVAEModel, "encode", short)
    ways = ["whole", "in tiles of 16 latent pixels", "in tiles of 16 latent pixels on the CPU"]
    if not fits:
        with pytest.raises(torch.OutOfMemoryError):
            latents()
        assert tried == ways
        return
    assert torch.equal(latents(), expected)
    assert tried == ways[: ways.index(fits) + 1]
    assert pipeline.report.encode == fits


def test_without_a_picture_it_makes_video_from_text(pipeline: wan.WanTI2V) -> None:
    plain = pipeline.generate("a cat", size=(64, 32), **SMALL)
    assert plain is not None and plain.shape == (3, 5, 32, 64)
    assert torch.equal(plain, pipeline.t2v("a cat", size=(64, 32), **SMALL))  # type: ignore[arg-type]
    assert not torch.equal(plain, pipeline.t2v("a dog", size=(64, 32), **SMALL))  # type: ignore[arg-type]


def test_batched_guidance_changes_nothing_but_rounding(pipeline: wan.WanTI2V) -> None:
    image = picture(64, 64)
    one = pipeline.i2v("a cat", image, 64 * 64, **SMALL)
    two = pipeline.i2v("a cat", image, 64 * 64, use_batched_cfg=True, **SMALL)
    assert one is not None and two is not None and (one - two).abs().max() < 1e-3
    in_turns = pipeline.i2v("a cat", image, 64 * 64, lockstep_cfg=True, **SMALL)
    assert in_turns is not None and torch.equal(in_turns, one)


def test_sizes_that_cannot_be_made_are_refused(pipeline: wan.WanTI2V) -> None:
    with pytest.raises(BadRequest, match="multiples of 32"):
        pipeline.generate("a cat", size=(80, 48), **SMALL)
    with pytest.raises(BadRequest, match=r"no 32x32 grid fits a 96x64 picture into 100 pixels"):
        pipeline.generate("a cat", img=picture(), max_area=100, **SMALL)


def test_a_checkpoint_of_another_family_is_refused(
    ti2v_checkpoint: Path, tiny_checkpoint: Path, small_config: Callable[[str], Any]
) -> None:
    with pytest.raises(BadCheckpoint, match=r"is a transformer for ti2v; .* needs one for t2v"):
        config = small_config("t2v-14B")
        config.update(vae_checkpoint="Wan2.2_VAE.pth")
        wan.WanT2V(config, ti2v_checkpoint, device="cpu")
    with pytest.raises(BadCheckpoint):
        wan.WanTI2V(small_config("ti2v-5B"), tiny_checkpoint, device="cpu")
