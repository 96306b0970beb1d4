"""Other ways to compute the VAE: the same video and latents, fewer bytes moved, nothing of a stream lost."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wan.engine.attempts import uncompiled
from wan.engine.compiling import Compiled, room_for_forms
from wan.engine.engine import Engine
from wan.engine.optimizations import VAEChannelsLast, VAECompile, VAEMatmulAttention, VAESubpixel
from wan.engine.plan import Optimization
from wan.engine.types import Tiling
from wan.modules.vae import Decoder3d, Encoder3d, WanVAEModel, load_vae
from wan.modules.vae_blocks import FrameCache
from wan.modules.vae_config import VAEConfig

FLOAT32 = 1e-5
"""What the options promise: only the order of sums differs."""
ENGINE = cast("Engine", None)
TINY = {
    "2.1": VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1),
    "2.2": VAEConfig(z_dim=48, encoder_dim=8, decoder_dim=16, num_res_blocks=1, patch_size=2, grouped=True),
}
LAST, SUBPIXEL = VAEChannelsLast(vae_channels_last=True), VAESubpixel(vae_subpixel=True)
ALL = (LAST, SUBPIXEL, VAEMatmulAttention(vae_matmul_attention=True))
BOTH = pytest.mark.parametrize("name", TINY)


def tiny(name: str, **sizes: int) -> WanVAEModel:
    """Random weights that let every path matter: gains near 1 and biases that are not 0."""
    model = WanVAEModel(replace(TINY[name], **sizes)).eval().requires_grad_(False)
    for key, value in model.named_parameters():
        if key.endswith("gamma"):
            value.uniform_(0.5, 1.5)
        else:
            value.normal_(std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
    return model


def other(model: WanVAEModel, *options: Optimization) -> WanVAEModel:
    """A copy of the model, computed another way."""
    copy = deepcopy(model)
    for option in options:
        option.finish(copy, "vae", ENGINE)
    return copy


def halved(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.bfloat16()


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


TILES = Tiling(tile=2, overlap=1)
WAYS: dict[str, Callable[[WanVAEModel, Tensor, Tensor], Tensor]] = {
    "decode frame by frame": lambda vae, z, video: vae.decode(z),
    "decode two at a time": lambda vae, z, video: vae.decode(z, frames_per_chunk=2),
    "decode in tiles": lambda vae, z, video: torch.cat(list(vae.decode_chunks(z, tiling=TILES)), dim=2),
    "encode": lambda vae, z, video: vae.encode(video),
    "encode in tiles": lambda vae, z, video: vae.encode(video[:, :, :5], tiling=TILES),
    "encode one picture": lambda vae, z, video: vae.encode_sparse({0: video[:, :, 0]}, 9),
}


def compared(plain: WanVAEModel, *models: WanVAEModel, sides: tuple[int, int] = (3, 2)) -> list[tuple[str, Any]]:
    """What each model makes of random latents and videos of nine frames, every way there is; `plain` first."""
    height, width = sides
    z = torch.randn(1, plain.z_dim, 3, height, width)
    video = torch.rand(1, 3, 9, height * plain.stride[1], width * plain.stride[1]) * 2 - 1
    with torch.inference_mode():
        return [(way, [made(model, z, video) for model in (plain, *models)]) for way, made in WAYS.items()]


@BOTH
@pytest.mark.parametrize("options", [ALL[:1], ALL[1:]], ids=["channels last", "the others"])
def test_random_weights_give_the_same_video_and_latents_however_they_are_cut(
    name: str, options: tuple[Optimization, ...]
) -> None:
    model = tiny(name)
    for way, (plain, fast) in compared(model, other(model, *options)):
        assert plain.shape == fast.shape and plain.dtype == fast.dtype, way
        assert relative_error(fast, plain) < FLOAT32, way


@BOTH
def test_in_half_precision_they_are_as_near_to_float32_as_the_plain_layers(name: str) -> None:
    exact = tiny(name)
    plain = deepcopy(exact)
    halved(plain)
    for way, (reference, rounded, fast) in compared(exact, plain, other(plain, *ALL)):
        assert relative_error(fast, reference) < 1.3 * relative_error(rounded, reference), way


def test_the_demos_vae_gives_the_same_video_and_latents(root: Any) -> None:
    model = load_vae(root / "demo" / "Wan2.1_VAE.pth", torch.float32)
    for way, (plain, fast) in compared(model, other(model, *ALL), sides=(4, 6)):
        assert relative_error(fast, plain) < FLOAT32, way


@BOTH
def test_keys_stay_the_files_and_what_is_added_moves_with_the_model(name: str) -> None:
    model = tiny(name)
    fast = other(model, *ALL)
    assert fast.state_dict().keys() == model.state_dict().keys()
    doubling = [buffer for key, buffer in fast.named_buffers() if key.endswith("doubling")]
    assert len(doubling) == 3
    assert all(buffer.is_meta for buffer in fast.to("meta").buffers())


# Bytes -------------------------------------------------------------------------------------------------------------

COPIES = {"cat", "clone", "copy_", "constant_pad_nd", "_to_copy", "repeat_interleave", "index_select", "stack"}


class Moved(TorchDispatchMode):
    """The largest result of operations that only copy, in values, and the memory formats operations are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.formats: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.formats.add((kwargs or {}).get("memory_format"))
        if func.overloadpacket.__name__ in COPIES:
            self.largest = max(self.largest, out.numel())
        return out


def moved(model: WanVAEModel, coded: Callable[[WanVAEModel], Any]) -> Moved:
    with torch.no_grad(), Moved() as found:  # not inference_mode, under which some operations are not taken apart
        coded(model)
    return found


@pytest.mark.parametrize(("name", "way"), [("2.1", "decode"), ("2.2", "decode"), ("2.1", "encode")])
def test_no_large_activation_is_copied(name: str, way: str) -> None:
    """Of eight latent frames in one go: only frames before they are enlarged are (doubled in time) and two frames of
    the past, or, encoding, frames that have been made smaller (what VAE 2.2 folds around its groups is left out)."""
    model = tiny(name, encoder_dim=16, decoder_dim=8)
    full, side = {"decode": 8 * 32 * 16**2, "encode": 16 * 32 * 16**2}[way], {"decode": 2, "encode": 16}[way]
    network, channels = {"decode": (Decoder3d, model.z_dim), "encode": (Encoder3d, 3)}[way]

    def code(vae: WanVAEModel) -> None:
        coder, cache = next(part for part in vae.children() if isinstance(part, network)), FrameCache()
        for frames in {"decode": (8, 8), "encode": (1, 32)}[way]:
            coder(torch.randn(1, channels, frames, side, side), cache)

    assert moved(other(model, LAST, SUBPIXEL), code).largest <= full / 4
    assert moved(model, code).largest >= full


@BOTH
def test_frames_are_never_laid_out_as_if_they_were_one_image(name: str) -> None:
    """`torch.channels_last` is for 4-D tensors: videos have `channels_last_3d`."""
    fast = other(tiny(name), *ALL)
    z, video = torch.randn(1, fast.z_dim, 2, 2, 3), torch.randn(1, 3, 5, 32, 32)
    formats = moved(fast, lambda vae: (vae.decode(z), vae.encode(video))).formats
    assert torch.channels_last_3d in formats
    assert torch.channels_last not in formats


# Compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("2.1", ()), ("2.2", ALL)], ids=["2.1", "2.2 with every other option"])
def test_compiled_without_a_break_twice_a_stage_it_is_the_same(
    name: str, options: tuple[Optimization, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the first chunk of a stream and once for all that follow; another video compiles nothing."""
    monkeypatch.setattr(Compiled, "backend", "eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = tiny(name, dim_mult=(2, 2), temporal_down=(True,))
    compiled = other(plain, *options, VAECompile(vae_compile=True))
    graphs = 2 * len(compiled.stages()) - 1  # the encoder's attention has no past
    with torch.inference_mode(), room_for_forms(64):
        z, video = torch.randn(1, plain.z_dim, 4, 4, 2), torch.rand(1, 3, 7, *(2 * plain.stride[1],) * 2) * 2 - 1
        decoded, encoded = compiled.decode(z), compiled.encode(video)
        assert counters["stats"]["unique_graphs"] == graphs
        assert relative_error(decoded, plain.decode(z)) < FLOAT32
        assert relative_error(encoded, plain.encode(video)) < FLOAT32
        compiled.decode(-z)
        compiled.encode(-video)
        assert counters["stats"]["unique_graphs"] == graphs
        with uncompiled():  # as after running out of memory
            assert relative_error(compiled.decode(z[..., 1:, :]), plain.decode(z[..., 1:, :])) < FLOAT32
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@BOTH
@pytest.mark.slow
def test_compiled_however_a_video_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "backend", "aot_eager")
    model = tiny(name)
    with room_for_forms(1024):
        for way, (plain, *compiled) in compared(model, *(other(model, *o, VAECompile()) for o in ((), ALL))):
            assert all(relative_error(each, plain) < FLOAT32 for each in compiled), way
