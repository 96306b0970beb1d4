"""Checkpoints of one small model in every layout, for tests that read them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.engine.weights.keymap import DIFFUSERS_DIT, TRANSFORMERS_T5, KeyMap, diffusers_vae
from wan.engine.weights.write import write_safetensors
from wan.layouts.library import text_encoder_config, transformer_config, vae_config

DATA = Path(__file__).parent / "data"
EXPERTS = {"high": "high_noise_model", "low": "low_noise_model"}
T5_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"

Networks = dict[str, nn.Module]
State = dict[str, Tensor]


@pytest.fixture(scope="session")
def tool(root: Path) -> ModuleType:
    """tools/convert.py."""
    spec = importlib.util.spec_from_file_location("convert", root / "tools" / "convert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def networks() -> Networks:
    """Two experts of the published head width, a text encoder and a VAE, with random weights."""
    from wan.modules.model import WanModel
    from wan.modules.t5 import T5Encoder
    from wan.modules.vae import WanVAEModel
    from wan.modules.vae_config import VAEConfig

    made: Networks = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("high", "low"):
            made[name] = WanModel(dim=384, ffn_dim=96, freq_dim=32, text_dim=32, num_heads=3, num_layers=2, text_len=32)
            nn.init.normal_(made[name].head.head.weight, std=0.1)  # type: ignore[union-attr,arg-type]
        made["text_encoder"] = T5Encoder(400, 32, 32, 48, num_heads=2, num_layers=2, num_buckets=8, shared_pos=False)
        made["vae"] = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1))
    return made


@pytest.fixture
def layout_config(tiny_config: Any) -> Any:
    tiny_config.update(dim=384, ffn_dim=96, freq_dim=32, num_heads=3, num_layers=2, text_len=32)
    return tiny_config


def save(path: Path, state: State, names: KeyMap | None = None, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {prefix + (names.to_theirs(k) if names else k): v.contiguous() for k, v in state.items()},
        str(path),
        metadata={"format": "pt"},
    )
    return path


def save_shards(folder: Path, stem: str, state: State, names: KeyMap | None = None) -> None:
    state = {names.to_theirs(key) if names else key: value for key, value in state.items()}
    table = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    write_safetensors(folder, stem, table, state.items(), limit=2**16)
    assert len(list(folder.glob(f"{stem}-*.safetensors"))) > 1


def original(folder: Path, networks: Networks, *, shards: bool = False) -> Path:
    for part, name in EXPERTS.items():
        networks[part].save_pretrained(folder / name)  # type: ignore[operator]
        if shards:
            (folder / name / "diffusion_pytorch_model.safetensors").unlink()
            save_shards(folder / name, "diffusion_pytorch_model", networks[part].state_dict())
    torch.save(networks["text_encoder"].state_dict(), folder / T5_FILE)
    torch.save(networks["vae"].state_dict(), folder / VAE_FILE)
    shutil.copytree(DATA / "umt5-tiny", folder / "google" / "umt5-xxl")
    return folder


def sharded(folder: Path, networks: Networks) -> Path:
    return original(folder, networks, shards=True)


def diffusers(folder: Path, networks: Networks) -> Path:
    configs: dict[str, Any] = {"text_encoder": text_encoder_config(networks["text_encoder"])}
    configs["vae"] = vae_config(networks["vae"].config)
    for part, name in (("high", "transformer"), ("low", "transformer_2")):
        configs[name] = transformer_config(networks[part].config)
        save(folder / name / "diffusion_pytorch_model.safetensors", networks[part].state_dict(), DIFFUSERS_DIT)
    (folder / "text_encoder").mkdir()
    state = networks["text_encoder"].state_dict()
    save_shards(folder / "text_encoder", "model", state, TRANSFORMERS_T5)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save(vae, networks["vae"].state_dict(), diffusers_vae(4, 1))
    for name, fields in configs.items():
        (folder / name / "config.json").write_text(json.dumps(fields))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    shutil.copytree(DATA / "umt5-tiny", folder / "tokenizer")
    return folder


def comfyui(folder: Path, networks: Networks) -> Path:
    """A `models` folder where other programs' files lie too; one expert with the prefix, one without."""
    unet = folder / "diffusion_models"
    prefix = "model.diffusion_model."
    save(unet / "wan2.2_t2v_high_noise_14B_fp16.safetensors", networks["high"].state_dict(), prefix=prefix)
    save(unet / "sub" / "wan2.2_t2v_low_noise_14B_fp16.safetensors", networks["low"].state_dict())
    save(unet / "flux1-dev.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)})
    (unet / "wan2.2_t2v_high_noise_14B_Q8_0.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    t5 = {TRANSFORMERS_T5.to_theirs(key): value for key, value in networks["text_encoder"].state_dict().items()}
    save(folder / "text_encoders" / "umt5_xxl_fp16.safetensors", t5 | {"spiece_model": spiece()})
    one_table = {key: value for key, value in t5.items() if "block.1.layer.0.SelfAttention.rel" not in key}
    save(folder / "text_encoders" / "t5xxl_fp16.safetensors", one_table)
    save(folder / "vae" / "wan_2.1_vae.safetensors", networks["vae"].state_dict())
    save(folder / "vae" / "qwen_image_vae.safetensors", networks["vae"].state_dict())
    return folder


def spiece() -> Tensor:
    return torch.frombuffer(bytearray((DATA / "umt5-spiece" / "spiece.model").read_bytes()), dtype=torch.uint8)


LAYOUTS: dict[str, Callable[[Path, Networks], Path]] = {
    "original": original, "sharded": sharded, "diffusers": diffusers, "ComfyUI": comfyui,
}  # fmt: skip


@pytest.fixture
def layouts(networks: Networks, tmp_path: Path) -> Callable[[str], Path]:
    """Writes the checkpoint in the layout of that name and gives its folder."""
    return lambda name: LAYOUTS[name](tmp_path / name, networks)


@pytest.fixture(scope="session")
def save_weights() -> Callable[..., Path]:
    """`save(path, state, names, prefix)`: a safetensors file under other names."""
    return save
