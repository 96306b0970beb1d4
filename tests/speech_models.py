"""A tiny speech-to-video checkpoint in the published layout: random weights, a few MB, the speech model included."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

AUDIO_DIM = 20
SIZES = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 3}
WAV2VEC = "wav2vec2-large-xlsr-53-english"


def save_wav2vec(folder: Path) -> Path:
    """wav2vec2 in the form of the published one (24 layers, layer norms before them), very narrow."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=AUDIO_DIM, num_hidden_layers=24, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Wav2Vec2ForCTC(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


def save_checkpoint(folder: Path, tokenizer: Path) -> Path:
    """All of Wan2.2-S2V-14B's folder."""
    from wan.modules.s2v import WanModel_S2V
    from wan.modules.t5 import T5Encoder
    from wan.modules.vae import WanVAEModel
    from wan.modules.vae_config import VAEConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit = WanModel_S2V(**SIZES, text_dim=32, audio_dim=AUDIO_DIM, audio_inject_layers=(0, 2))
        nn.init.normal_(dit.head.head.weight, std=0.1)  # born as zeros: nothing would reach the output
        nn.init.constant_(dit.casual_audio_encoder.weights, 0.5)
        dit.save_pretrained(folder)
        encoder = T5Encoder(320, 32, 32, 48, num_heads=2, num_layers=1, num_buckets=8, shared_pos=False)
        torch.save(encoder.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        vae = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1))
        torch.save(vae.state_dict(), folder / "Wan2.1_VAE.pth")
    shutil.copytree(tokenizer, folder / "google" / "umt5-xxl")
    save_wav2vec(folder / WAV2VEC)
    return folder
