"""Tiny checkpoints of each family in the published layout, with random weights, and configs that go with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 2}

Write = Callable[[Path, nn.Module, nn.Module, str], Path]


@pytest.fixture(scope="session")
def write_checkpoint() -> Write:
    """`write(folder, dit, vae, VAE file)`: a folder of one expert with a text encoder and a tokenizer."""
    from wan.modules.t5 import T5Encoder

    def write(folder: Path, dit: Any, vae: nn.Module, vae_file: str) -> Path:
        nn.init.normal_(dit.head.head.weight, std=0.1)  # born as zeros: nothing would reach the output
        dit.save_pretrained(folder)
        encoder = T5Encoder(320, 32, 32, 48, num_heads=2, num_layers=1, num_buckets=8, shared_pos=False)
        torch.save(encoder.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save(vae.state_dict(), folder / vae_file)
        shutil.copytree(ROOT / "tests" / "wan" / "data" / "umt5-tiny", folder / "google" / "umt5-xxl")
        return folder

    return write


@pytest.fixture(scope="session")
def ti2v_checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Write) -> Path:
    """One expert on VAE 2.2: 48 latent channels, pictures a sixteenth of the size."""
    from wan.modules.model import WanModel
    from wan.modules.vae import WanVAEModel
    from wan.modules.vae_config import VAEConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit = WanModel(model_type="ti2v", in_dim=48, out_dim=48, text_dim=32, text_len=32, **SIZES)
        vae = WanVAEModel(
            VAEConfig(z_dim=48, encoder_dim=8, decoder_dim=8, num_res_blocks=1, patch_size=2, grouped=True)
        )
        return write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-TI2V", dit, vae, "Wan2.2_VAE.pth")


@pytest.fixture(scope="session")
def vace_checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Write) -> Path:
    """One expert with a side stack that acts after both its blocks."""
    from wan.modules.vace_model import VaceWanModel
    from wan.modules.vae import WanVAEModel
    from wan.modules.vae_config import VAEConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit = VaceWanModel(vace_layers=(0, 1), vace_in_dim=96, text_dim=32, text_len=32, **SIZES)
        for layer in (dit.vace_blocks[0].before_proj, *(block.after_proj for block in dit.vace_blocks)):
            nn.init.normal_(layer.weight, std=0.2)  # type: ignore[union-attr,arg-type]
        vae = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1))
        return write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-VACE", dit, vae, "Wan2.1_VAE.pth")


@pytest.fixture
def small_config() -> Callable[[str], Any]:
    """The configuration of a task in the sizes of these checkpoints; a copy, free to change."""
    from easydict import EasyDict

    from wan.configs import WAN_CONFIGS

    def make(task: str) -> Any:
        config = EasyDict(WAN_CONFIGS[task])
        config.update(SIZES, text_len=32, param_dtype=torch.float32, t5_dtype=torch.float32, sample_neg_prompt="blurry")
        return config

    return make
