"""Both VAEs: upstream's keys and numbers, diffusers' numbers, and a stream that never depends on how it is cut."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.modules.vae import WanVAE, WanVAEModel, build_vae
from wan.modules.vae2_1 import Wan2_1_VAE
from wan.modules.vae2_2 import Wan2_2_VAE
from wan.modules.vae_blocks import FrameCache
from wan.modules.vae_config import VAE_2_1, VAE_2_2, VAEConfig

# float32 against float32: only the order of sums differs.
FLOAT32 = 1e-5
TINY_2_1 = VAEConfig(encoder_dim=8, decoder_dim=8)
TINY_2_2 = VAEConfig(z_dim=48, encoder_dim=8, decoder_dim=16, patch_size=2, grouped=True)
SMALL_2_1 = VAEConfig(encoder_dim=8, decoder_dim=12, num_res_blocks=1)
BOTH = pytest.mark.parametrize("config", [TINY_2_1, TINY_2_2], ids=["2.1", "2.2"])


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


def tiny(config: VAEConfig) -> WanVAEModel:
    """Random weights that let every path matter: gains near 1 and biases that are not 0."""
    model = WanVAEModel(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            value.uniform_(0.5, 1.5)
        elif value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5)
        else:
            value.normal_(std=0.1)
    return model


def video_of(model: WanVAEModel, num_frames: int = 9, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(1, 3, num_frames, height, width) * 2 - 1


# Keys and sizes.


@pytest.mark.parametrize(
    ("config", "tensors", "digest"),
    [
        (VAE_2_1, 194, "6d12bd5199d9dcd5b316dbc98c72a68be03e0ac320eb14a4ccd3b5a7bac04ca8"),
        (VAE_2_2, 196, "d6eb318580d7756b4a0e2187642cbff278616b7e3d4580d041014a424ab0911e"),
    ],
    ids=["2.1", "2.2"],
)
def test_full_size_keys_and_shapes_are_upstreams(config: VAEConfig, tensors: int, digest: str) -> None:
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in WanVAEModel(config).state_dict().items()}
    assert len(shapes) == tensors
    lines = "\n".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest
    assert build_vae(shapes).config == config


@pytest.mark.parametrize("config", [TINY_2_1, SMALL_2_1, TINY_2_2])
def test_sizes_are_read_from_the_shapes(config: VAEConfig) -> None:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in WanVAEModel(config).state_dict().items()}
    built = build_vae(shapes)
    assert built.config == config
    assert all(value.is_meta for value in built.parameters())
    assert built.stride == ((4, 16, 16) if config.grouped else (4, 8, 8))
    assert built.z_dim == config.z_dim


def test_foreign_or_damaged_shapes_are_refused_with_the_key() -> None:
    with pytest.raises(BadCheckpoint, match="encoder.conv1.weight"):
        build_vae({"blocks.0.weight": (3, 3)})
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in WanVAEModel(TINY_2_1).state_dict().items()}
    with pytest.raises(BadCheckpoint, match=r"decoder\.middle\.0\.residual\.2\.bias"):
        build_vae({key: shape for key, shape in shapes.items() if key != "decoder.middle.0.residual.2.bias"})
    with pytest.raises(BadCheckpoint, match="'surplus'"):
        build_vae(shapes | {"surplus": (1,)})


# Numbers.


def test_vae_2_1_equals_recorded_values(golden: Path) -> None:
    recorded = load_file(golden / "vae_2.1.safetensors")
    vae = WanVAE(vae_pth=golden / "t2v-A14B" / "Wan2.1_VAE.pth", device="cpu")
    assert relative_error(vae.encode([recorded["video9"]])[0], recorded["out.enc9"]) < FLOAT32
    assert relative_error(vae.encode([recorded["video1"]])[0], recorded["out.enc1"]) < FLOAT32
    # Upstream was given 7 frames here and silently dropped the last two.
    assert relative_error(vae.encode([recorded["video7"][:, :5]])[0], recorded["out.enc7"]) < FLOAT32
    for name in ("3", "1"):
        assert relative_error(vae.decode([recorded[f"latents{name}"]])[0], recorded[f"out.dec{name}"]) < FLOAT32


def diffusers_vae(config: VAEConfig) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    grouped = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    return AutoencoderKLWan(
        base_dim=config.encoder_dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_dim,
        dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_down), **(grouped if config.grouped else {}),
    ).eval()  # fmt: skip


def diffusers_key(key: str, config: VAEConfig) -> str:
    """Upstream's key of either VAE -> the key in diffusers' AutoencoderKLWan."""

    def down(match: re.Match[str]) -> str:
        level, layer = match[1], match[2]
        if layer is None:
            return f"encoder.down_blocks.{level}."
        name = "downsampler" if int(layer) == config.num_res_blocks else f"resnets.{layer}"
        return f"encoder.down_blocks.{level}.{name}."

    def up(match: re.Match[str]) -> str:
        layers = config.num_res_blocks + 2
        level, layer = (int(match[1]), int(match[2])) if match[2] else divmod(int(match[1]), layers)
        sampler = "upsampler" if config.grouped else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{sampler if layer == layers - 1 else f'resnets.{layer}'}."

    key = re.sub(r"^conv1\.", "quant_conv.", key)
    key = re.sub(r"^conv2\.", "post_quant_conv.", key)
    key = re.sub(r"^(en|de)coder\.conv1\.", r"\1coder.conv_in.", key)
    key = re.sub(r"middle\.([02])\.", lambda match: f"mid_block.resnets.{int(match[1]) // 2}.", key)
    key = key.replace("middle.1.", "mid_block.attentions.0.").replace("head.0.", "norm_out.")
    key = key.replace("head.2.", "conv_out.").replace("shortcut", "conv_shortcut")
    key = re.sub(r"^decoder\.upsamples\.(\d+)\.(?:upsamples\.(\d+)\.)?", up, key)
    key = re.sub(r"^encoder\.downsamples\.(\d+)\.(?:downsamples\.(\d+)\.)?", down, key)
    for ours, theirs in {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}.items():
        key = key.replace(f"residual.{ours}.", f"{theirs}.")
    return key


@pytest.mark.parametrize(
    "config",
    [
        TINY_2_1,
        SMALL_2_1,
        TINY_2_2,
        VAEConfig(
            z_dim=48, encoder_dim=8, decoder_dim=8, num_res_blocks=1, patch_size=2, grouped=True,
            temporal_down=(True, False, True),
        ),
    ],
    ids=["2.1", "2.1 one block", "2.2", "2.2 one block, other levels"],
)  # fmt: skip
def test_equals_diffusers_with_every_key_mapped(config: VAEConfig) -> None:
    model, reference = tiny(config), diffusers_vae(config)
    mapped = {diffusers_key(key, config): value for key, value in model.state_dict().items()}
    assert len(mapped) == len(model.state_dict())
    reference.load_state_dict(mapped, strict=True)
    video = video_of(model)
    mean, std = (value.view(1, -1, 1, 1, 1) for value in (model.mean, model.std))
    with torch.no_grad():
        moments = reference.encode(video).latent_dist.mean
        assert relative_error(model.encode(video) * std + mean, moments) < FLOAT32
        latents = torch.randn_like(moments)
        decoded = model.decode(latents).clamp(-1, 1)
        assert relative_error(decoded, reference.decode(latents * std + mean).sample) < FLOAT32
        assert 0.1 < decoded.std() < 0.95  # neither dead nor saturated: the comparison means something


# The stream.


@BOTH
@pytest.mark.parametrize("frames_per_chunk", [2, 3, 4, None])
def test_chunks_of_any_size_equal_frame_by_frame(config: VAEConfig, frames_per_chunk: int | None) -> None:
    model = tiny(config)
    latents = torch.randn(1, config.z_dim, 4, 2, 3)
    assert relative_error(model.decode(latents, frames_per_chunk=frames_per_chunk), model.decode(latents)) < FLOAT32
    video = video_of(model, num_frames=13)
    assert relative_error(model.encode(video, frames_per_chunk=frames_per_chunk), model.encode(video)) < FLOAT32


@BOTH
def test_decoding_yields_one_frame_then_four_per_latent_frame(config: VAEConfig) -> None:
    model = tiny(config)
    latents = torch.randn(1, config.z_dim, 4, 2, 3)
    counts = {n: [part.shape[2] for part in model.decode_chunks(latents, frames_per_chunk=n)] for n in (1, 3)}
    assert counts == {1: [1, 4, 4, 4], 3: [9, 4]}


@BOTH
def test_streams_interleave_without_touching_each_other(config: VAEConfig) -> None:
    model = tiny(config)
    latents = torch.randn(2, config.z_dim, 3, 2, 2)
    streams = [model.decode_chunks(part) for part in latents.split(1)]
    together = [torch.cat(parts) for parts in zip(*streams, strict=True)]
    assert relative_error(torch.cat(together, dim=2), model.decode(latents)) < FLOAT32


@BOTH
def test_memory_of_a_stream_does_not_grow_with_its_length(config: VAEConfig) -> None:
    model = tiny(config)
    kept = []
    for latent_frames in (3, 6):
        cache = FrameCache()
        for part in torch.randn(1, config.z_dim, latent_frames, 2, 2).split(1, dim=2):
            model.decoder(part, cache)
        # The storage counts, not the view: a cached slice must not keep its whole chunk alive.
        kept.append(sum(value.untyped_storage().nbytes() for value in cache.values()))
    assert kept[0] == kept[1]


@BOTH
def test_latents_see_no_later_frame(config: VAEConfig) -> None:
    model = tiny(config)
    video = video_of(model, num_frames=9)
    changed = video.clone()
    changed[:, :, 5:] = 0
    before, after = model.encode(video), model.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


# Precision and training.


@BOTH
def test_bfloat16_is_close_to_float32(config: VAEConfig) -> None:
    model = tiny(config)
    latents, video = torch.randn(1, config.z_dim, 3, 2, 3), video_of(model)
    decoded, encoded = model.decode(latents), model.encode(video)
    model.bfloat16()
    assert model.decode(latents).dtype == torch.bfloat16
    assert model.encode(video).dtype == torch.float32
    # 8 bits of mantissa (0.4 % a rounding) through about 30 layers of random weights.
    assert relative_error(model.decode(latents), decoded) < 0.05
    assert relative_error(model.encode(video), encoded) < 0.05


@BOTH
def test_statistics_follow_the_module_and_keep_float32(config: VAEConfig) -> None:
    model = WanVAEModel(config).bfloat16()
    assert model.mean.dtype == model.std.dtype == torch.float32
    assert model.mean[0].item() == pytest.approx(-0.2289 if config.grouped else -0.7571)
    assert model.std[-1].item() == pytest.approx(0.7744 if config.grouped else 1.9160)
    assert model.to("meta").mean.is_meta
    assert not any("mean" in key or "std" in key for key in model.state_dict())


@BOTH
def test_gradients_reach_every_parameter_and_do_not_depend_on_chunks(config: VAEConfig) -> None:
    model = tiny(config).requires_grad_(True)
    video = video_of(model, height=16, width=32)

    def gradients(frames_per_chunk: int | None) -> dict[str, torch.Tensor]:
        latents = model.encode(video, frames_per_chunk=frames_per_chunk)
        model.zero_grad()
        (model.decode(latents, frames_per_chunk=frames_per_chunk) - video).square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters()}

    whole = gradients(None)
    assert all(value is not None and value.abs().sum() > 0 for value in whole.values())
    chunked = gradients(1)
    # Sums over chunks round differently, and biases before a norm have gradients that nearly cancel.
    assert all(relative_error(chunked[name], value) < 1e-3 for name, value in whole.items())


# What users meet.


@pytest.mark.parametrize(("given", "nearest"), [(2, "1 or 5"), (8, "5 or 9"), (12, "9 or 13"), (0, "1 or 5")])
def test_frames_are_never_dropped_silently(given: int, nearest: str) -> None:
    with pytest.raises(BadRequest, match=rf"{given} frames.*4n\+1.*pass {nearest}"):
        tiny(TINY_2_1).encode(torch.zeros(1, 3, given, 32, 32))


def test_pixels_are_never_cut_silently() -> None:
    with pytest.raises(BadRequest, match="40x30 pixels.*multiples of 8.*40x32"):
        tiny(TINY_2_1).encode(torch.zeros(1, 3, 1, 30, 40))


@pytest.mark.parametrize(
    ("door", "config"), [(WanVAE, TINY_2_1), (Wan2_1_VAE, SMALL_2_1), (Wan2_2_VAE, TINY_2_2)], ids=str
)
def test_upstreams_doors_take_lists_and_batches(door: type[WanVAE], config: VAEConfig, tmp_path: Path) -> None:
    model = tiny(config)
    torch.save(model.state_dict(), tmp_path / "vae.pth")
    vae = door(vae_pth=str(tmp_path / "vae.pth"), device="cpu")
    videos = video_of(model, num_frames=5).repeat(2, 1, 1, 1, 1)
    latents = vae.encode(list(videos))
    assert [value.shape for value in latents] == [
        (config.z_dim, 2, 32 // vae.model.stride[1], 48 // vae.model.stride[2])
    ] * 2
    assert all(torch.equal(a, b) for a, b in zip(latents, vae.encode(videos), strict=True))
    assert relative_error(latents[0], model.encode(videos[:1])[0]) < FLOAT32
    decoded = vae.decode([value * 3 for value in latents])
    assert decoded[0].shape == (3, 5, 32, 48)
    assert decoded[0].dtype == torch.float32 and decoded[0].abs().max() <= 1
    assert (vae.dtype, vae.device, len(vae.scale)) == (torch.float32, torch.device("cpu"), 2)
    assert torch.equal(vae.scale[0], vae.mean) and torch.equal(vae.scale[1], 1 / vae.std)
    # Upstream's pipelines also call the network itself, with the scale in hand.
    assert torch.equal(vae.model.encode(videos[:1], vae.scale)[0], latents[0])


def test_doors_read_safetensors_and_other_dtypes(tmp_path: Path) -> None:
    model = tiny(TINY_2_1)
    save_file(model.state_dict(), tmp_path / "vae.safetensors")
    vae = WanVAE(vae_pth=tmp_path / "vae.safetensors", dtype=torch.bfloat16, device="cpu")
    assert vae.dtype == torch.bfloat16
    assert vae.decode([torch.randn(16, 1, 2, 2)])[0].dtype == torch.float32


def test_doors_refuse_the_other_vae_and_no_file(tmp_path: Path) -> None:
    torch.save(tiny(TINY_2_2).state_dict(), tmp_path / "vae.pth")
    with pytest.raises(BadCheckpoint, match="48 latent channels, z_dim=16"):
        WanVAE(vae_pth=tmp_path / "vae.pth", device="cpu")
    with pytest.raises(BadCheckpoint, match="vae_pth=None"):
        Wan2_2_VAE(device="cpu")
    with pytest.raises(BadCheckpoint):
        WanVAE(vae_pth=tmp_path / "absent.pth", device="cpu")


def test_a_loaded_model_gets_upstreams_interface() -> None:
    model = tiny(TINY_2_1)
    vae = WanVAE.from_model(model)
    assert vae.model is model
    assert vae.decode([torch.randn(16, 2, 2, 3)])[0].shape == (3, 5, 16, 24)


@pytest.mark.parametrize("num_frames", [1, 5, 33, 81])
@pytest.mark.parametrize("grouped", [False, True], ids=["2.1", "2.2"])
def test_video_of_a_few_frames_is_encoded_to_the_bit_in_less_work(grouped: bool, num_frames: int) -> None:
    sizes: dict[str, Any] = {"z_dim": 48, "patch_size": 2, "grouped": True} if grouped else {}
    model = WanVAEModel(VAEConfig(encoder_dim=4, decoder_dim=4, num_res_blocks=1, **sizes)).eval()
    calls: list[int] = []
    model.encoder.conv1.register_forward_hook(lambda *_: calls.append(1))
    for numbers in ((0,), (0, num_frames - 1), (num_frames // 2,)):
        frames = {number: torch.rand(1, 3, 32, 48) * 2 - 1 for number in numbers}
        video = torch.zeros(1, 3, num_frames, 32, 48)
        for number, frame in frames.items():
            video[:, :, number] = frame
        with torch.inference_mode():
            whole = model.encode(video)
            calls.clear()
            assert torch.equal(model.encode_sparse(frames, num_frames), whole)
        # Full-size layers see the given chunks, and two blank ones after each run begins.
        assert len(calls) <= 7
