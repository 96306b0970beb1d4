"""Names are translated one to one, both ways, and nothing is left over in either library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.keymap import DIFFUSERS_DIT, TRANSFORMERS_T5, KeyMap, diffusers_vae, diffusers_vae22
from wan.modules.model import WanModel
from wan.modules.t5 import T5Encoder
from wan.modules.vae import WanVAEModel
from wan.modules.vae_config import VAE_2_2, VAEConfig


def assert_one_to_one(names: KeyMap, ours: nn.Module, theirs: nn.Module, twice: tuple[str, ...] = ()) -> None:
    mine = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    other = {key: tuple(value.shape) for key, value in theirs.state_dict().items() if key not in twice}
    assert {names.to_theirs(key): shape for key, shape in mine.items()} == other
    assert {names.to_ours(key): shape for key, shape in other.items()} == mine


def test_every_weight_of_the_dit_has_one_name_in_diffusers() -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        ours = WanModel(dim=24, ffn_dim=32, freq_dim=16, text_dim=8, num_heads=1, num_layers=12)
        theirs = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=24, ffn_dim=32, freq_dim=16, text_dim=8, num_layers=12
        )
    assert_one_to_one(DIFFUSERS_DIT, ours, theirs)


def test_every_weight_of_the_text_encoder_has_one_name_in_transformers() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 11, "num_heads": 2}
    with torch.device("meta"):
        ours = T5Encoder(32, 8, 8, 16, num_heads=2, num_layers=11, num_buckets=32, shared_pos=False)
        theirs = UMT5EncoderModel(UMT5Config(**sizes))
    assert_one_to_one(TRANSFORMERS_T5, ours, theirs, twice=("encoder.embed_tokens.weight",))


@pytest.mark.parametrize("num_res_blocks", [1, 2])
def test_every_weight_of_the_vae_has_one_name_in_diffusers(num_res_blocks: int) -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        ours = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=num_res_blocks))
        theirs = AutoencoderKLWan(base_dim=8, num_res_blocks=num_res_blocks)
    assert_one_to_one(diffusers_vae(4, num_res_blocks), ours, theirs)


def test_every_weight_of_the_2_2_vae_has_one_name_in_diffusers() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        ours = WanVAEModel(replace(VAE_2_2, encoder_dim=8, decoder_dim=12))
        theirs = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=12, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2
        )
    assert_one_to_one(diffusers_vae22(VAE_2_2.num_res_blocks), ours, theirs)


def test_unknown_weight_is_refused_by_name() -> None:
    with pytest.raises(BadCheckpoint, match="audio_injector"):
        DIFFUSERS_DIT.to_theirs("audio_injector.injector.0.q.weight")
