"""FLOP, bytes and seconds against independent counts: torch's own counter, and figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wan.engine.roofline import (
    CARDS,
    VAE,
    Transformer,
    card_for,
    card_of,
    decoder,
    encoder,
    forward,
    forward_seconds,
    vae_flops,
)
from wan.engine.types import Condition
from wan.modules.model import WanModel
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAEConfig

H100 = next(card for card in CARDS if card.name == "H100")
SHARED = {"out_channels": 16, "text_len": 512, "text_dim": 4096}
BIG = Transformer(
    dim=5120, ffn_dim=13824, num_heads=40, num_blocks=40, in_channels=16, num_bytes=28_580_000_000,
    block_bytes=703_000_000, **SHARED,
)  # fmt: skip
SMALL = Transformer(
    dim=1536, ffn_dim=8960, num_heads=12, num_blocks=30, in_channels=16, num_bytes=2_840_000_000,
    block_bytes=93_000_000, **SHARED,
)  # fmt: skip
VAE_2_1 = VAE(num_bytes=507_000_000, **vars(VAEConfig()))
VAE_2_2 = VAE(
    num_bytes=2_820_000_000,
    **vars(VAEConfig(z_dim=48, encoder_dim=160, decoder_dim=256, patch_size=2, grouped=True)),
)


@pytest.mark.parametrize(
    ("net", "tokens", "tera"), [(BIG, 75_600, 6523), (BIG, 32_760, 1678), (SMALL, 32_760, 283), (SMALL, 75_600, 1250)]
)
def test_a_forward_takes_the_published_models_flop(net: Transformer, tokens: int, tera: float) -> None:
    assert forward(net, tokens).total / 1e12 == pytest.approx(tera, rel=0.01)


@pytest.mark.parametrize(
    ("net", "tokens", "seconds"), [(BIG, 75_600, 10.1), (BIG, 32_760, 2.61), (SMALL, 32_760, 0.47)]
)
def test_a_compiled_forward_on_an_h100_takes_the_seconds_worked_out(
    net: Transformer, tokens: int, seconds: float
) -> None:
    assert forward_seconds(net, tokens, H100, compiled=True) == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize(
    ("net", "latent", "decoded", "encoded"),
    [(VAE_2_1, (21, 60, 104), 275, 164), (VAE_2_1, (21, 90, 160), 639, 382), (VAE_2_2, (31, 44, 80), 2011, 383)],
)
def test_a_vae_takes_the_published_models_flop(
    net: VAE, latent: tuple[int, int, int], decoded: float, encoded: float
) -> None:
    frames, height, width = latent
    time, side = net.stride
    convs = encoder(net, (frames - 1) * time + 1, height * side, width * side)
    assert vae_flops(net, decoder(net, *latent), frames, height * width) / 1e12 == pytest.approx(decoded, rel=0.01)
    assert vae_flops(net, convs, frames, height * width) / 1e12 == pytest.approx(encoded, rel=0.01)


def test_a_small_transformer_takes_the_flop_that_torch_counts() -> None:
    with torch.device("meta"):
        dit = WanModel(dim=64, ffn_dim=160, num_heads=2, num_layers=3, text_len=16, text_dim=32, freq_dim=32)
        latents, text = torch.empty(1, 16, 3, 24, 16), torch.empty(1, 16, 32)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            dit.velocity(latents, torch.empty(1), Condition(context=text))
    net = Transformer(
        dim=64, ffn_dim=160, num_heads=2, num_blocks=3, in_channels=16, out_channels=16, text_len=16, text_dim=32,
        num_bytes=0, block_bytes=0,
    )  # fmt: skip
    assert forward(net, 288).total == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_small_vae_takes_the_flop_that_torch_counts(grouped: bool) -> None:
    config = VAEConfig(z_dim=4, encoder_dim=8, decoder_dim=12, num_res_blocks=1, grouped=grouped)
    with torch.device("meta"):
        model, latents = WanVAEModel(config), torch.empty(1, 4, 3, 8, 8)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.decode(latents, frames_per_chunk=None)
    counted = vae_flops(VAE(num_bytes=0, **vars(config)), decoder(VAE(num_bytes=0, **vars(config)), 3, 8, 8), 3, 64)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"), ("NVIDIA H200", 139.8, "H200"), ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40GB"), ("NVIDIA A100 80GB PCIe", 79.2, "A100 80GB"),
        ("NVIDIA L4", 22.0, "L4"), ("NVIDIA RTX A6000", 47.4, "A6000"), ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", 11.7, "RTX 3060"),
    ],
)  # fmt: skip
def test_a_card_is_known_by_the_name_cuda_has_for_it(name: str, gib: float, card: str) -> None:
    found = card_of(name, int(gib * 2**30))
    known = next(each for each in CARDS if each.name == card)
    assert (found.bf16, found.hbm, found.source) == (known.bf16, known.hbm, "data sheet")
    assert found.memory == int(gib * 2**30)


def test_an_unknown_card_borrows_rates_and_says_so() -> None:
    assert "RTX 3060 assumed" in card_of("Some GPU", 8 * 2**30).source
    assert card_for(24 * 10**9).name == "L4"
    assert card_for(10**15).memory == max(card.memory for card in CARDS)
