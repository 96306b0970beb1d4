"""The planner's bytes of decoding and encoding are those that the operations keep alive, whole and in tiles, at real
sizes. On the meta device: nothing is computed. Three chunks show the peak, as no more is remembered afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wan.engine.coding import Tile, decoding, encoding
from wan.engine.live_bytes import peak_live_bytes
from wan.engine.roofline import CARDS, VAE
from wan.engine.types import Tiling
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAEConfig

FRAMES = 9
VAE_2_1 = VAEConfig()
VAE_2_2 = VAEConfig(z_dim=48, encoder_dim=160, decoder_dim=256, patch_size=2, grouped=True)


def model_of(config: VAEConfig, dtype: torch.dtype = torch.float32) -> tuple[WanVAEModel, VAE]:
    """A VAE on the meta device, and its sizes as the planner has them."""
    with torch.device("meta"):
        model = WanVAEModel(config).to(dtype).requires_grad_(False)
    return model, VAE(num_bytes=0, element_size=dtype.itemsize, **vars(config))


def cut(tile: int | None) -> tuple[Tiling | None, Tile | None]:
    """All tiles keep what they remember: what waits in RAM cannot be told apart on the meta device."""
    return (None, None) if tile is None else (Tiling(tile=tile, overlap=8, park=False), Tile(tile, 8, False))


CASES: list[Any] = [
    (VAE_2_1, (480, 832), None, torch.float32),
    pytest.param(VAE_2_1, (480, 832), 32, torch.float32, marks=pytest.mark.slow),
    (VAE_2_1, (720, 1280), 64, torch.bfloat16),
    (VAE_2_2, (704, 1280), None, torch.bfloat16),
    pytest.param(VAE_2_2, (704, 1280), 32, torch.float32, marks=pytest.mark.slow),
]


def named(value: Any) -> str:
    return "2.2" if value == VAE_2_2 else "2.1" if isinstance(value, VAEConfig) else str(value)


@pytest.mark.parametrize(("config", "size", "tile", "dtype"), CASES, ids=named)
def test_bytes_of_a_pass_are_those_that_are_alive(
    config: VAEConfig, size: tuple[int, int], tile: int | None, dtype: torch.dtype
) -> None:
    (model, net), (tiling, planned) = model_of(config, dtype), cut(tile)
    video = torch.empty(1, 3, FRAMES, *size, dtype=dtype, device="meta")
    side = net.stride[1]
    latents = torch.empty(1, config.z_dim, 3, size[0] // side, size[1] // side, dtype=dtype, device="meta")

    def decode() -> None:
        for frames in model.decode_chunks(latents, tiling=tiling):
            del frames  # the sink has them

    found = (
        decoding(net, (FRAMES, *size), CARDS[0], planned, 1)[0],
        encoding(net, (FRAMES, *size), CARDS[0], planned)[0],
    )
    counted = peak_live_bytes(decode), peak_live_bytes(lambda: model.encode(video, tiling=tiling))
    assert found == (pytest.approx(counted[0], rel=0.05), pytest.approx(counted[1], rel=0.05))


def test_tiles_that_wait_in_ram_hold_one_past_and_cost_copies() -> None:
    _, net = model_of(VAE_2_1)
    parked, kept = (decoding(net, (81, 720, 1280), CARDS[0], Tile(32, 8, park), 1) for park in (True, False))
    assert parked[0] < kept[0] / 3 and parked[1] > kept[1]
    assert parked[0] < decoding(net, (81, 720, 1280), CARDS[0], None, 1)[0] / 8
