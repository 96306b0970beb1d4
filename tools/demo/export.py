"""Writes a checkpoint folder in upstream's layout from what training left, and reads no more than that."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import dit, scenes, text
from .adapter import write_adapter

# Half of float32's bytes. The loaders compute in float32; rounding the weights costs 3e-4 of their size.
STORED = torch.float16
EXPERTS = ("high", "low")


def export(vae_file: Path, experts: dict[str, Path], folder: Path) -> None:
    """`vae_file` holds the VAE with its normalisation folded in; `experts` maps high/low to a trained file."""
    for name, source in experts.items():
        saved = torch.load(source, weights_only=True)
        place = folder / f"{name}_noise_model"
        place.mkdir(parents=True, exist_ok=True)
        _write_config(dit.DitConfig(), place)
        save_file(stored(saved["dit"]), place / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        torch.save(stored(saved["text"]), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(stored(torch.load(vae_file, weights_only=True)), folder / "Wan2.1_VAE.pth")
    text.write_tokenizer(folder / "google" / "umt5-xxl")


def export_adapters(experts: dict[str, Path], folder: Path) -> None:
    """Adapters of the experts in `folder` as the checkpoint `folder`/i2v, with a picture to try it with."""
    for name, source in experts.items():
        place = folder / "i2v" / f"{name}_noise_model"
        trained = torch.load(source, weights_only=True)["dit"]
        write_adapter(stored(trained), f"../../{name}_noise_model", place)
        _write_config(dit.DitConfig(in_dim=trained["patch_embedding.weight"].shape[1]), place)
    scene = scenes.random_scene(random.Random(1), ("orange", "square", "right"))
    scenes.picture(scenes.render([scene])[0, :, 0]).save(folder / "i2v" / "example.png", optimize=True)


def _write_config(config: dit.DitConfig, place: Path) -> None:
    content = json.dumps(config.to_json(), indent=2, sort_keys=True)
    (place / "config.json").write_text(content + "\n", encoding="utf-8")


def read_back(folder: Path, work: Path) -> None:
    """The inverse of `export`, to train on: vae.pt, high.pt and low.pt in `work`."""

    def widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.float() for name, value in state.items()}

    words = widened(torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True))
    for name in EXPERTS:
        dit = load_file(folder / f"{name}_noise_model" / "diffusion_pytorch_model.safetensors")
        torch.save({"dit": widened(dit), "base": {}, "text": words, "steps": 0}, work / f"{name}.pt")
    torch.save(widened(torch.load(folder / "Wan2.1_VAE.pth", weights_only=True)), work / "vae.pt")


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in the dtype they are shipped in."""
    return {name: value.detach().to(STORED).contiguous() for name, value in state.items()}
