"""Training a few megabytes on top of a DiT that stays as it is: thin matrices beside those of the blocks (LoRA), and
whole the two layers that meet the latents, of which the first gets more input channels.

Stored as a PEFT folder, which `wan.engine.weights.adapter` reads as a checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .dit import Params

WHOLE = ("patch_embedding", "head.head")
_PREFIX = "base_model.model."
_THIN = re.compile(r"(blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02]))\.weight")


def init_adapter(base: Params, rank: int, in_dim: int, seed: int) -> Params:
    """What is trained, under PEFT's names. It changes nothing yet: `up` matrices and new input channels are zero."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: base[name].clone() for name in base if name.rpartition(".")[0] in WHOLE}
    narrow = trained["patch_embedding.weight"]
    trained["patch_embedding.weight"] = narrow.new_zeros(len(narrow), in_dim, *narrow.shape[2:])
    trained["patch_embedding.weight"][:, : narrow.shape[1]] = narrow
    for name in base:
        if match := _THIN.fullmatch(name):
            rows, columns = base[name].shape
            trained[f"{match[1]}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            trained[f"{match[1]}.lora_B.weight"] = torch.zeros(rows, rank)
    return trained


def adapted(base: Params, trained: Params) -> Params:
    """The DiT's parameters with what was trained put in; gradients flow to `trained`."""
    weights = dict(base)
    for name, value in trained.items():
        layer = name.removesuffix(".lora_B.weight")
        if layer != name:
            weights[f"{layer}.weight"] = torch.addmm(base[f"{layer}.weight"], value, trained[f"{layer}.lora_A.weight"])
        elif not name.endswith(".lora_A.weight"):
            weights[name] = value
    return weights


def write_adapter(trained: dict[str, Tensor], base_folder: str, folder: Path) -> None:
    """The PEFT folder; `base_folder` is where the DiT lies that was trained on, seen from `folder`."""
    rank = next(len(value) for name, value in trained.items() if name.endswith(".lora_A.weight"))
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base_folder, "r": rank, "lora_alpha": rank,
        "target_modules": _THIN.pattern.removesuffix(r"\.weight"), "modules_to_save": list(WHOLE), "bias": "none",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    named = {_PREFIX + name: value for name, value in trained.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
