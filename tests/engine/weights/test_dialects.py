"""Networks and spellings are told by keys; every dialect translates both ways and leaves strange keys as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.dialects import identify, open_network
from wan.engine.weights.keymap import DIFFUSERS_DIT, Dialect


@pytest.mark.parametrize(
    ("key", "ours", "network"),
    [
        ("blocks.3.self_attn.q.weight", "blocks.3.self_attn.q.weight", "dit"),
        ("model.diffusion_model.blocks.3.cross_attn.q.bias", "blocks.3.cross_attn.q.bias", "dit"),
        ("diffusion_model.blocks.11.attn1.to_out.0.bias", "blocks.11.self_attn.o.bias", "dit"),
        ("blocks.0.attn.q.weight", "blocks.0.attn.q.weight", "text_encoder"),
        ("encoder.block.7.layer.1.DenseReluDense.wi_0.weight", "blocks.7.ffn.gate.0.weight", "text_encoder"),
        ("model.encoder.downsamples.0.residual.0.gamma", "encoder.downsamples.0.residual.0.gamma", "vae"),
        ("encoder.down_blocks.0.norm1.gamma", "encoder.downsamples.0.residual.0.gamma", "vae"),
        ("encoder.down_blocks.1.resnets.0.conv2.bias", "encoder.downsamples.1.downsamples.0.residual.6.bias", "vae"),
    ],
)
def test_one_key_is_enough_to_tell_network_and_spelling(key: str, ours: str, network: str) -> None:
    keys = [key] if ".resnets" not in key else [key, "encoder.down_blocks.0.resnets.0.conv1.bias"]
    found = identify(["something.else", *keys])
    assert found is not None and found[0] == network
    assert found[1].ours(key) == ours and found[1].theirs(ours) == key


@pytest.mark.parametrize("key", ["vace_blocks.0.self_attn.q.weight", "unet.blocks.0.self_attn.q.weight", "x"])
def test_other_networks_are_not_taken_for_wans(key: str) -> None:
    assert identify([key]) is None


def test_keys_that_nothing_translates_stay_as_they_are() -> None:
    dialect = Dialect("model.", DIFFUSERS_DIT, left_out=("spare",))
    for key in ("model.condition_embedder.audio_embedder.norm1.weight", "other.proj_out.bias"):
        assert dialect.ours(key) == key and dialect.theirs(key) == key
    assert dialect.ours("spare") is None
    assert dialect.ours("model.proj_out.bias") == "head.head.bias"


def test_tensors_come_under_our_names(tmp_path: Path) -> None:
    weights = {f"model.blocks.{i}.attn1.to_q.weight": torch.randn(3) for i in range(12)}
    save_file(weights, str(tmp_path / "w.safetensors"))
    streamed = dict(open_network(tmp_path / "w.safetensors", "dit").stream())
    assert all(torch.equal(streamed[f"blocks.{i}.self_attn.q.weight"], weights[key]) for i, key in enumerate(weights))
    with pytest.raises(BadCheckpoint, match=r"w\.safetensors' is a transformer, not a video VAE"):
        open_network(tmp_path / "w.safetensors", "vae")
